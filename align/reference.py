"""The published vocabulary map (`mined_published`): FuseLLM's code (arXiv 2401.10491) pairs tokens by their spellings.

Special tokens are compared too. To reproduce the rest of that code, a recipe sets `positions = "dtw"`, `gold_anchor = false`,
`collisions = "first"`, and in `[fusion]` `fallback = "one_hot_published"`.

Axes: V source vocabulary, N searched spellings.
"""

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ..store.tokenizer import Tokenizer
from .edit_distance import nearest
from .vocabulary import UNMAPPED, TokenPairs


def published_map(source: Tokenizer, *, target: Tokenizer) -> pl.DataFrame:
    """The published MinED map, in the form of `vocabulary_map`: rules `exact` (the same spelling), `mined` and `none`.

    Raw spellings are compared, including special tokens, as the tokenizers return them for an id. A tokenizer with a dummy prefix may add
    it to special tokens (`▁<s>`); this spelling is not in the vocabulary, so a source token nearest to one is lost.
    """
    source_pieces, target_pieces = (
        [tokenizer.backend.id_to_token(token_id) or "" for token_id in range(tokenizer.vocab_size)] for tokenizer in (source, target)
    )
    ids_V, distance_V = nearest_pieces(
        source_pieces,
        target_pieces=target_pieces,
        target_ids=target.backend.get_vocab(with_added_tokens=True),
        source_word_start=source.word_start,
        target_word_start=target.word_start,
    )
    pairs = TokenPairs(source.token_bytes.to_list(), target_texts=target.token_bytes.to_list())
    for v, (target_id, distance) in enumerate(zip(ids_V.tolist(), distance_V.tolist(), strict=True)):
        if target_id != UNMAPPED and source_pieces[v]:
            pairs.put(v, target_id, rule="mined" if distance else "exact", distance=distance)
    return pairs.table()


def nearest_pieces(
    source_pieces: list[str],
    *,
    target_pieces: list[str],
    target_ids: dict[str, int],
    source_word_start: str,
    target_word_start: str,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The published MinED map of lists of pieces, by id.

    Args:
        source_pieces: spellings of the source's tokens.
        target_pieces: spellings of the target's tokens; empty where an id has none.
        target_ids: the target's vocabulary, to look up the nearest spelling.
        source_word_start: word-start mark of the source, which is replaced with the target's.
        target_word_start: word-start mark of the target.

    Returns:
        For each source token the target token of the same spelling, else the lowest id at the smallest Levenshtein distance, -1 if its
        spelling is not in the vocabulary [V]; and the distance [V].
    """
    respelled = [piece.replace(source_word_start, target_word_start) for piece in source_pieces]
    candidates = [piece for piece in target_pieces if piece]
    ids_V, distance_V = np.array([target_ids.get(piece, UNMAPPED) for piece in respelled], np.int32), np.zeros(len(respelled), np.int32)
    missing_V = np.flatnonzero(ids_V == UNMAPPED)
    index_N, distance_N = nearest([respelled[v] for v in missing_V], candidates=candidates)
    found_N = np.array([target_ids.get(piece, UNMAPPED) for piece in candidates], np.int32)
    ids_V[missing_V], distance_V[missing_V] = found_N[index_N], distance_N
    return ids_V, distance_V
