"""The stage that makes `vocab_maps/<source>--<target>--<rule>`: one part, a table with a row per source token."""

from collections.abc import Sequence
from typing import Any

import polars as pl

from ..store.dataset import Dataset, PartContent
from ..store.tokenizer import Tokenizer
from .reference import published_map
from .rests import rest_target_ids
from .vocabulary import vocabulary_map


def end_of_turn(source: Dataset, *, target: Dataset) -> tuple[int, int] | None:
    """The tokens with which source and target end the assistant's turn, from their distributions; None for plain text."""
    source_id, target_id = (dataset.identity.get("chat", {}).get("end_of_turn") for dataset in (source, target))
    return None if source_id is None or target_id is None else (source_id, target_id)


def vocabulary_map_identity(
    source: str, *, target: str, rule: str, matches: Dataset | None = None, end_of_turn: tuple[int, int] | None = None
) -> dict[str, Any]:
    """What determines a vocabulary map: the digests of both tokenizers, for `stat` the `matches` (`token_matches`), and `end_of_turn`."""
    identity: dict[str, Any] = {"stage": "vocab_maps/3", "source": source, "target": target, "rule": rule}
    if matches is not None:
        identity["matches"] = matches.fingerprint
    if end_of_turn is not None:
        identity["end_of_turn"] = list(end_of_turn)
    return identity


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
        end_of_turn: tuple[int, int] | None = None,
    ) -> None:
        """For `stat`, `matches` holds how often tokens are matched in each of the `parts`; for `end_of_turn` see `vocabulary_map`."""
        self.dataset, self.source, self.target, self.rule, self.matches, self.parts = dataset, source, target, rule, matches, parts
        self.end_of_turn = end_of_turn

    def compute(self, part: int) -> PartContent:
        """The whole map, as part 0."""
        assert part == 0
        if self.rule == "mined_published":
            table = published_map(self.source, target=self.target)
        else:
            table = vocabulary_map(
                self.source, target=self.target, rule=self.rule, matches=self._all_matches(), end_of_turn=self.end_of_turn
            )
        if self.rule == "prefix":
            table = table.with_columns(rest_target_ids=rest_target_ids(self.source, target=self.target))
        return PartContent(data=table, counts={"source_tokens": len(table), "mapped": len(table) - table["target_id"].null_count()})

    def _all_matches(self) -> pl.DataFrame | None:
        if self.matches is None:
            return None
        return pl.concat([self.matches.table(part) for part in self.parts]).group_by("source_id", "target_id").agg(pl.sum("count"))
