"""Vocabulary maps: the target token for each source token.

    exact     the target token with the same bytes
    prefix    as `exact`, else the first piece of the source token's bytes under the target's tokenizer in mid-text position: if the source
              predicts these bytes, the target's next token is their first piece
    mined     as `exact`, else the token at the smallest edit distance (FuseLLM, arXiv 2401.10491, section 3.2)
    stat      as `exact`, else the token with which it is most often matched in the corpus, else as `mined` (FuseChat, arXiv
              2408.07990, section 3.1; its released code prefers the rarer partner, because it multiplies the distance by sigmoid(count))

Edit distances are between texts: word-start marks count as spaces, and a byte that is not a whole character counts as one character.
Special tokens are mapped by their role, never by their text, and no other token is mapped to them.
"""

from itertools import accumulate

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ..store.roles import ROLES
from ..store.tokenizer import Tokenizer
from .edit_distance import distances, nearest

UNMAPPED = -1
_ANCHOR = "\n"  # placed before a piece to prevent a dummy space
_SCHEMA = {
    "source_id": pl.UInt32, "target_id": pl.UInt32, "rule": pl.String, "distance": pl.UInt32, "count": pl.UInt64,
    "source_bytes": pl.Binary, "target_bytes": pl.Binary,
}  # fmt: skip


class TokenPairs:
    """A vocabulary map under construction: for each source token its target token, the rule, and the distance of their texts."""

    def __init__(self, source_texts: list[bytes], *, target_texts: list[bytes]) -> None:
        self.source_texts, self.target_texts = source_texts, target_texts
        self.target_ids = [UNMAPPED] * len(source_texts)
        self.rules = ["none"] * len(source_texts)
        self.distances: list[int | None] = [None] * len(source_texts)

    def put(self, source_id: int, target_id: int, *, rule: str, distance: int | None = None) -> None:
        """Map a source token."""
        self.target_ids[source_id], self.rules[source_id], self.distances[source_id] = target_id, rule, distance

    def missing(self) -> list[int]:
        """Source tokens with text that are not mapped yet."""
        return [v for v, text in enumerate(self.source_texts) if text and self.target_ids[v] == UNMAPPED]

    def table(self, *, matches: pl.DataFrame | None = None) -> pl.DataFrame:
        """The map as `vocabulary_map` returns it."""
        columns = {
            "source_id": range(len(self.target_ids)),
            "target_id": [None if target_id == UNMAPPED else target_id for target_id in self.target_ids],
            "rule": self.rules,
            "distance": self.distances,
            "count": [None] * len(self.target_ids),
            "source_bytes": self.source_texts,
            "target_bytes": [None if target_id == UNMAPPED else self.target_texts[target_id] for target_id in self.target_ids],
        }
        table = pl.DataFrame(columns, schema=_SCHEMA)
        if matches is None:
            return table
        counted = table.drop("count").join(matches, on=["source_id", "target_id"], how="left", maintain_order="left")
        count = pl.when(pl.col("target_id").is_not_null()).then(pl.col("count").fill_null(0))
        return counted.with_columns(count=count).select(pl.col(name).cast(dtype) for name, dtype in _SCHEMA.items())


def vocabulary_map(
    source: Tokenizer, *, target: Tokenizer, rule: str, matches: pl.DataFrame | None = None, end_of_turn: tuple[int, int] | None = None
) -> pl.DataFrame:
    """Map every token of the source's vocabulary.

    Args:
        source: tokenizer whose tokens are mapped.
        target: tokenizer of the target vocabulary.
        rule: `exact`, `prefix`, `mined` or `stat`.
        matches: for `stat`, how often tokens are matched in the corpus: source_id, target_id and count, a row per pair (`token_matches`).
        end_of_turn: for conversations, the tokens with which source and target end the assistant's turn.

    Returns:
        One row per source id: source_id; target_id (null if unmapped); rule, the one that applied (`exact`, `prefix`, `mined`, `stat`,
        `role` or `none`); distance (Levenshtein, in characters; null if it was not needed); count (how often the two are matched in the
        corpus; null without `matches`); source_bytes; target_bytes.
    """
    pairs = TokenPairs(source.token_bytes.to_list(), target_texts=target.token_bytes.to_list())
    by_bytes = _ids_by_bytes(target)
    for v in pairs.missing():
        if pairs.source_texts[v] in by_bytes:
            pairs.put(v, by_bytes[pairs.source_texts[v]], rule="exact", distance=0)
    match rule:
        case "prefix":
            rest = pairs.missing()
            firsts = first_pieces([pairs.source_texts[v] for v in rest], target=target)
            for v, first in zip(rest, firsts, strict=True):
                pairs.put(v, first, rule="none" if first == UNMAPPED else "prefix")
        case "mined":
            _put_nearest(pairs, target=target, by_bytes=by_bytes)
        case "stat":
            assert matches is not None
            _put_partners(pairs, matches=matches)
            _put_nearest(pairs, target=target, by_bytes=by_bytes)
    of_role: dict[int, int] = {}
    for role in ROLES:
        source_id, target_id = source.roles[role], target.roles[role]
        if source_id is not None and target_id is not None:
            of_role.setdefault(source_id, target_id)  # for a token with several roles the first counts: eos if it is also pad
    if end_of_turn is not None:
        of_role[end_of_turn[0]] = end_of_turn[1]
    for source_id, target_id in of_role.items():
        pairs.put(source_id, target_id, rule="role")
    return pairs.table(matches=matches)


def _put_nearest(pairs: TokenPairs, *, target: Tokenizer, by_bytes: dict[bytes, int]) -> None:
    """Map the remaining tokens to the token at the smallest edit distance; on ties, to the lowest id.

    SentencePiece's byte tokens are parts of characters, which either equal a text or not: they are not near to any other text.
    """
    candidates = sorted((token_id, text) for text, token_id in by_bytes.items() if token_id not in target.byte_fallback_ids)
    rest = pairs.missing()
    index_N, distance_N = nearest([_text(pairs.source_texts[v]) for v in rest], candidates=[_text(text) for _, text in candidates])
    for v, index, distance in zip(rest, index_N.tolist(), distance_N.tolist(), strict=True):
        if index >= 0:
            pairs.put(v, candidates[index][0], rule="mined", distance=distance)


def _put_partners(pairs: TokenPairs, *, matches: pl.DataFrame) -> None:
    """Map the remaining tokens to their most frequent partner; on ties, to the smallest edit distance, then the lowest id."""
    rest = pl.DataFrame({"source_id": pairs.missing()}, schema={"source_id": pl.UInt32})
    with_text = pl.DataFrame({"target_id": [w for w, text in enumerate(pairs.target_texts) if text]}, schema={"target_id": pl.UInt32})
    tied = (
        matches.join(rest, on="source_id", how="semi")
        .join(with_text, on="target_id", how="semi")
        .filter(pl.col("count") == pl.col("count").max().over("source_id"))
    )
    texts = ([_text(pairs.source_texts[v]) for v in tied["source_id"]], [_text(pairs.target_texts[w]) for w in tied["target_id"]])
    chosen = tied.with_columns(distance=distances(*texts)).sort("source_id", "distance", "target_id").unique("source_id", keep="first")
    for source_id, target_id, distance in chosen.select("source_id", "target_id", "distance").iter_rows():
        pairs.put(source_id, target_id, rule="stat", distance=distance)


def _text(data: bytes) -> str:
    return data.decode(errors="surrogateescape")


def target_ids(table: pl.DataFrame) -> NDArray[np.int32]:
    """A map's column target_id as an array over the source's ids; -1 if unmapped."""
    return table["target_id"].cast(pl.Int32).fill_null(UNMAPPED).to_numpy()


def _ids_by_bytes(tokenizer: Tokenizer) -> dict[bytes, int]:
    """Lowest id of each byte string; `<0x61>` only if no other token is `a`, because otherwise the tokenizer never writes it."""
    found: dict[bytes, int] = {}
    for token_id, piece in sorted(enumerate(tokenizer.token_bytes.to_list()), key=lambda entry: entry[0] in tokenizer.byte_fallback_ids):
        if piece:
            found.setdefault(piece, token_id)
    return found


def first_pieces(pieces: list[bytes], *, target: Tokenizer) -> list[int]:
    """For each byte string the target token with these bytes, else its first token in mid-text, else -1."""
    by_bytes = _ids_by_bytes(target)
    found = [by_bytes.get(piece, UNMAPPED) for piece in pieces]
    rest = [index for index, target_id in enumerate(found) if target_id == UNMAPPED]
    for index, first in zip(rest, _first_of_several([pieces[index] for index in rest], target=target, by_bytes=by_bytes), strict=True):
        found[index] = first
    return found


def _first_of_several(pieces: list[bytes], *, target: Tokenizer, by_bytes: dict[bytes, int]) -> list[int]:
    anchor = _ANCHOR if target.has_dummy_prefix else ""
    encoded = target.encode([anchor + piece.decode(errors="replace") for piece in pieces])
    table = target.token_bytes.to_list()
    firsts = []
    for piece, ids in zip(pieces, encoded, strict=True):
        # If the tokenizer changes the text (half a character, a rewriting normaliser), the longest prefix is used instead.
        skip = _tokens_of_anchor([table[token_id] for token_id in ids], piece=piece, anchor=anchor.encode())
        firsts.append(_longest_prefix(piece, by_bytes) if skip is None else ids[skip])
    return firsts


def _tokens_of_anchor(tokens: list[bytes], *, piece: bytes, anchor: bytes) -> int | None:
    """The number of tokens before the piece, if there is a token boundary between anchor and piece."""
    whole = b"".join(tokens)
    before = len(whole) - len(piece)
    if before < 0 or whole[before:] != piece or whole[:before].lstrip(b" ") != anchor:
        return None
    ends = [0, *accumulate(map(len, tokens))]
    if before not in ends:
        return None
    return len(ends) - 1 - ends[::-1].index(before)


def _longest_prefix(piece: bytes, by_bytes: dict[bytes, int]) -> int:
    return next((by_bytes[piece[:end]] for end in range(len(piece), 0, -1) if piece[:end] in by_bytes), UNMAPPED)
