"""Vocabulary maps: which target token is meant by each source token.

`exact`: the target token with the same bytes. `prefix`: that, else the first piece of the source token's bytes under the target's
tokenizer in mid-text position: if the source says that the text goes on with these bytes, the target's next token is their first piece.
Special tokens are mapped by their role, never by their text.
"""

from itertools import accumulate

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ..store.tokenizer import Tokenizer

UNMAPPED = -1
_MAPPED_ROLES = ("bos", "eos")
_ANCHOR = "\n"  # put before a piece so that a dummy space is not put there


def vocabulary_map(source: Tokenizer, *, target: Tokenizer, rule: str) -> pl.DataFrame:
    """Map every token of the source's vocabulary.

    Args:
        source: tokenizer whose tokens are mapped.
        target: tokenizer into whose vocabulary.
        rule: `exact` or `prefix`.

    Returns:
        One row per source id: source_id, target_id (null where unmapped), rule (`exact`, `prefix`, `role` or `none`), source_bytes,
        target_bytes.
    """
    source_bytes, target_bytes = source.token_bytes.to_list(), target.token_bytes.to_list()
    by_bytes = _ids_by_bytes(target)
    ids = [by_bytes.get(piece, UNMAPPED) if piece else UNMAPPED for piece in source_bytes]
    rules = ["none" if target_id == UNMAPPED else "exact" for target_id in ids]
    if rule == "prefix":
        rest = [v for v, piece in enumerate(source_bytes) if piece and ids[v] == UNMAPPED]
        firsts = first_pieces([source_bytes[v] for v in rest], target=target)
        for v, first in zip(rest, firsts, strict=True):
            ids[v], rules[v] = first, "none" if first == UNMAPPED else "prefix"
    for role in _MAPPED_ROLES:
        source_id, target_id = source.roles[role], target.roles[role]
        if source_id is not None and target_id is not None:
            ids[source_id], rules[source_id] = target_id, "role"
    columns = {
        "source_id": range(len(ids)),
        "target_id": [None if target_id == UNMAPPED else target_id for target_id in ids],
        "rule": rules,
        "source_bytes": source_bytes,
        "target_bytes": [None if target_id == UNMAPPED else target_bytes[target_id] for target_id in ids],
    }
    schema = {"source_id": pl.UInt32, "target_id": pl.UInt32, "rule": pl.String, "source_bytes": pl.Binary, "target_bytes": pl.Binary}
    return pl.DataFrame(columns, schema=schema)


def target_ids(table: pl.DataFrame) -> NDArray[np.int32]:
    """A map's column target_id as an array over the source's ids; -1 where unmapped."""
    return table["target_id"].cast(pl.Int32).fill_null(UNMAPPED).to_numpy()


def _ids_by_bytes(tokenizer: Tokenizer) -> dict[bytes, int]:
    """Lowest id of each byte string; `<0x61>` only if no other token is `a`, since then the tokenizer never writes it."""
    found: dict[bytes, int] = {}
    for token_id, piece in sorted(enumerate(tokenizer.token_bytes.to_list()), key=lambda entry: entry[0] in tokenizer.byte_fallback_ids):
        if piece:
            found.setdefault(piece, token_id)
    return found


def first_pieces(pieces: list[bytes], *, target: Tokenizer) -> list[int]:
    """For each byte string the target token of these bytes, else the one that comes first when it stands in mid-text, else -1."""
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
        # What the tokenizer did not keep as it is (half a character, a rewriting normaliser) goes by the longest prefix instead.
        skip = _tokens_of_anchor([table[token_id] for token_id in ids], piece=piece, anchor=anchor.encode())
        firsts.append(_longest_prefix(piece, by_bytes) if skip is None else ids[skip])
    return firsts


def _tokens_of_anchor(tokens: list[bytes], *, piece: bytes, anchor: bytes) -> int | None:
    """How many tokens come before the piece, if the tokens are those of anchor and piece with a boundary in between."""
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
