"""The rests of source tokens after their first bytes, in the target's vocabulary.

At a target position inside a source token (`cover`), each entry of the previous source position continues with the first piece of its
rest in the target's vocabulary.
"""

import numpy as np
import polars as pl

from ..store.tokenizer import Tokenizer
from .projection import VocabularyMap
from .vocabulary import UNMAPPED, first_pieces, target_ids


def rest_target_ids(source: Tokenizer, *, target: Tokenizer) -> pl.Series:
    """For each source id the target tokens with which its text continues after its first 1, 2, … bytes: lists of uint32, null if unmapped.

    The rule is `prefix`: the target token of the same bytes, else the first piece under the target's tokenizer in mid-text position.
    Special tokens, and tokens of one byte, have empty lists.
    """
    tokens = source.token_bytes.to_list()
    rests = [token[n:] for token in tokens for n in range(1, len(token))]
    distinct = list(dict.fromkeys(rests))
    firsts = dict(zip(distinct, first_pieces(distinct, target=target), strict=True))
    ids = pl.Series([None if firsts[rest] == UNMAPPED else firsts[rest] for rest in rests], dtype=pl.UInt32)
    lengths = np.maximum(source.token_bytes.lengths_V - 1, 0)
    rows = pl.DataFrame({"source_id": np.repeat(np.arange(len(tokens)), lengths), "rest_target_ids": ids})
    lists = rows.group_by("source_id", maintain_order=True).agg("rest_target_ids")
    every = pl.DataFrame({"source_id": np.arange(len(tokens))})
    empty = pl.Series([[]], dtype=pl.List(pl.UInt32))
    return every.join(lists, on="source_id", how="left", maintain_order="left")["rest_target_ids"].fill_null(empty)


def with_rests(table: pl.DataFrame) -> VocabularyMap:
    """A vocabulary map's table, with its column rest_target_ids, as arrays."""
    tokens = table["source_bytes"].to_list()
    lengths_V = np.fromiter(map(len, tokens), np.int64, len(tokens))
    offsets_V1 = np.concatenate([[0], np.cumsum(lengths_V)])
    is_rest_B = np.ones(offsets_V1[-1], np.bool_)
    is_rest_B[offsets_V1[:-1][lengths_V > 0]] = False
    rest_ids_B = np.full(len(is_rest_B), UNMAPPED, np.int32)
    rest_ids_B[is_rest_B] = table["rest_target_ids"].explode(empty_as_null=False).cast(pl.Int32).fill_null(UNMAPPED).to_numpy()
    return VocabularyMap(
        target_ids_V=target_ids(table), rest_ids_B=rest_ids_B, buffer_B=np.frombuffer(b"".join(tokens), np.uint8), offsets_V1=offsets_V1
    )
