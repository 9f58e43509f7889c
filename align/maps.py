"""The stage that makes `vocab_maps/<source>--<target>--<rule>`: one part, a table with a row per source token."""

from typing import Any

from ..store.dataset import Dataset, PartContent
from ..store.tokenizer import Tokenizer
from .rests import rest_target_ids
from .vocabulary import vocabulary_map


def vocabulary_map_identity(source: Tokenizer, *, target: Tokenizer, rule: str) -> dict[str, Any]:
    """What determines a vocabulary map."""
    return {"stage": "vocab_maps/2" if rule == "prefix" else "vocab_maps/1", "source": source.digest, "target": target.digest, "rule": rule}


class VocabularyMapStage:
    """Maps the source's vocabulary to the target's."""

    def __init__(self, dataset: Dataset, *, source: Tokenizer, target: Tokenizer, rule: str) -> None:
        self.dataset, self.source, self.target, self.rule = dataset, source, target, rule

    def compute(self, part: int) -> PartContent:
        """The whole map; it has only part 0."""
        assert part == 0
        table = vocabulary_map(self.source, target=self.target, rule=self.rule)
        if self.rule == "prefix":
            table = table.with_columns(rest_target_ids=rest_target_ids(self.source, target=self.target))
        return PartContent(data=table, counts={"source_tokens": len(table), "mapped": len(table) - table["target_id"].null_count()})
