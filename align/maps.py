"""The stage that makes `vocab_maps/<source>--<target>--<rule>`: one part, a table with a row per source token."""

from collections.abc import Sequence
from typing import Any

import polars as pl

from ..store.dataset import Dataset, PartContent
from ..store.tokenizer import Tokenizer
from .reference import published_map
from .rests import rest_target_ids
from .vocabulary import vocabulary_map


def vocabulary_map_identity(source: str, *, target: str, rule: str, matches: Dataset | None = None) -> dict[str, Any]:
    """What determines a vocabulary map: the digests of both tokenizers, and for `stat` the `matches` (`token_matches`)."""
    identity = {"stage": "vocab_maps/3", "source": source, "target": target, "rule": rule}
    return identity if matches is None else identity | {"matches": matches.fingerprint}


class VocabularyMapStage:
    """Maps the source's vocabulary to the target's."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        source: Tokenizer,
        target: Tokenizer,
        rule: str,
        matches: Dataset | None = None,
        parts: Sequence[int] = (),
    ) -> None:
        """`matches` holds, for `stat`, how often tokens are matched in each of the `parts`."""
        self.dataset, self.source, self.target, self.rule, self.matches, self.parts = dataset, source, target, rule, matches, parts

    def compute(self, part: int) -> PartContent:
        """The whole map; it has only part 0."""
        assert part == 0
        if self.rule == "mined_published":
            table = published_map(self.source, target=self.target)
        else:
            table = vocabulary_map(self.source, target=self.target, rule=self.rule, matches=self._all_matches())
        if self.rule == "prefix":
            table = table.with_columns(rest_target_ids=rest_target_ids(self.source, target=self.target))
        return PartContent(data=table, counts={"source_tokens": len(table), "mapped": len(table) - table["target_id"].null_count()})

    def _all_matches(self) -> pl.DataFrame | None:
        if self.matches is None:
            return None
        return pl.concat([self.matches.table(part) for part in self.parts]).group_by("source_id", "target_id").agg(pl.sum("count"))
