"""A kind of product that the project does not have: how long the documents of each part are."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import polars as pl
from fuseline.pipeline.products.corpus import Corpus
from fuseline.pipeline.products.cost import Cost, Sizes
from fuseline.pipeline.products.product import Drawing, OpenSite, PartsProduct, Product, Site
from fuseline.store.dataset import Dataset, PartContent
from fuseline.store.fingerprint import Identity


class LengthsStage:
    """Counts the characters of each segment."""

    def __init__(self, dataset: Dataset, *, corpus: Dataset) -> None:
        self.dataset, self.corpus = dataset, corpus

    def compute(self, part: int) -> PartContent:
        """One part."""
        lengths = self.corpus.table(part).select("doc_id", pl.col("text").str.len_chars().alias("characters"))
        return PartContent(data=lengths, counts={"segments": len(lengths)})


@dataclass(frozen=True, eq=False, kw_only=True)
class Lengths(PartsProduct):
    """`lengths/<corpus>`."""

    kind: ClassVar[str] = "lengths"
    command: ClassVar[str] = "run"
    noun: ClassVar[str] = "lengths"

    of_corpus: Corpus

    @classmethod
    def of(cls, drawing: Drawing) -> Iterator["Lengths"]:
        yield cls(recipe=drawing.recipe, of_corpus=drawing.get(Corpus, ""))

    @property
    def role(self) -> str:
        return ""

    @property
    def name(self) -> str:
        return self.suffixed(self.of_corpus.name)

    @property
    def inputs(self) -> tuple[Product, ...]:
        return (self.of_corpus,)

    @property
    def choices(self) -> Mapping[str, Any]:
        return {}

    def identity(self, site: Site) -> Identity:
        return {"stage": "lengths/1", "corpus": site.dataset(self.of_corpus).fingerprint}

    def stage(self, site: OpenSite) -> LengthsStage:
        return LengthsStage(site.dataset(self), corpus=site.dataset(self.of_corpus))

    def cost(self, sizes: Sizes) -> Cost:
        return Cost(stored_bytes=4.0 * sizes.text(self, "train").documents)
