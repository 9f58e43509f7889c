"""The stage that makes `token_matches/<source>--<target>--<positions>`: how often tokens are matched in each part of the corpus.

The table of a part has a row per pair of tokens: source_id and target_id (uint32), and count (uint64), how often a position map matches
them, whether or not they agree. `span` matches tokens that end at the same byte, `dtw` those on its path. Tokens without text are left
out. The vocabulary map `stat` sums over the parts.
"""

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ..store.dataset import Dataset, PartContent
from .pair import PairPart, PairStage
from .positions import UNALIGNED


def matches_identity(source: Dataset, *, target: Dataset, positions: str) -> dict[str, Any]:
    """What determines how often tokens are matched."""
    return {"stage": "token_matches/1", "source": source.fingerprint, "target": target.fingerprint, "positions": positions}


class TokenMatchesStage(PairStage):
    """Counts the matched tokens of a source and a target, by `span` or `dtw`."""

    def compute(self, part: int) -> PartContent:
        """Count the matches of one part."""
        pair = self.read(part)
        source_ids_T, target_ids_T = pair.source.side.token_ids_T, pair.target.side.token_ids_T
        source_P, target_P = self._matched(pair)
        table = count_pairs(source_ids_T[source_P], target_ids_T[target_P])
        for column, tokenizer in (("source_id", pair.source.tokenizer), ("target_id", pair.target.tokenizer)):
            table = table.filter(pl.Series(tokenizer.token_bytes.lengths_V > 0)[table[column]])
        counts = {"tokens": len(target_ids_T), "pairs": len(table), "matches": int(table["count"].sum())}
        return PartContent(data=table, counts=counts)

    def _matched(self, pair: PairPart) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if self.positions == "dtw":
            return pair.warp(self.spellings).pairs()
        position_T = pair.span()
        target_P = np.flatnonzero(position_T != UNALIGNED)
        return position_T[target_P].astype(np.int64), target_P


def count_pairs(source_ids_P: NDArray[Any], target_ids_P: NDArray[Any]) -> pl.DataFrame:
    """How often each pair of ids occurs: source_id, target_id, count, ordered by the ids."""
    pairs = pl.DataFrame({"source_id": source_ids_P, "target_id": target_ids_P})
    counted = pairs.group_by("source_id", "target_id").agg(count=pl.len()).sort("source_id", "target_id")
    return counted.cast({"source_id": pl.UInt32, "target_id": pl.UInt32, "count": pl.UInt64})
