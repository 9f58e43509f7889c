"""The fused targets: one distribution for each of the target's positions."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...align.config import FusionConfig
from ...align.fusion import FusionStage, fusion_choices, fusion_identity
from ...align.sources import FusionSource
from ...store.fingerprint import Identity, differences
from ...store.layout import Layout
from ..recipe import Fusion
from .aligned import Alignment, VocabularyMap
from .cost import Cost, Sizes, entry_bytes
from .forward import Distributions
from .product import Drawing, InputMissing, OpenSite, PartsProduct, Product, Site

_COMPONENTS = ("distributions", "alignment", "vocabulary map")  # of a source, in the order of the identity
_TARGET_BYTES = 3.5  # per token, in addition to its entries


@dataclass(frozen=True, eq=False, kw_only=True)
class Aligned:
    """A source and its maps to the target. The target's own start has no maps."""

    name: str
    distributions: Distributions
    alignment: Alignment | None = None
    vocabulary_map: VocabularyMap | None = None

    @property
    def products(self) -> tuple[PartsProduct, ...]:
        """The products that are read."""
        return tuple(product for product in (self.distributions, self.alignment, self.vocabulary_map) if product is not None)

    def source(self, site: Site) -> FusionSource:
        """The input of the stage."""
        maps = [None if product is None else site.dataset(product) for product in (self.alignment, self.vocabulary_map)]
        return FusionSource(name=self.name, distributions=site.dataset(self.distributions), alignment=maps[0], vocabulary_map=maps[1])


@dataclass(frozen=True, eq=False, kw_only=True)
class Targets(PartsProduct):
    """`targets/<fusion>`."""

    kind: ClassVar[str] = "targets"
    command: ClassVar[str] = "fuse"
    noun: ClassVar[str] = "targets"

    fusion: Fusion
    sources: tuple[Aligned, ...]  # the target's own start first

    @classmethod
    def of(cls, drawing: Drawing) -> Iterator["Targets"]:
        recipe = drawing.recipe
        start = Aligned(name=recipe.target.name, distributions=drawing.get(Distributions, recipe.target.name))
        for fusion in recipe.fusions:
            aligned = [
                Aligned(
                    name=source.name,
                    distributions=drawing.get(Distributions, source.name),
                    alignment=drawing.get(Alignment, source.name),
                    vocabulary_map=drawing.get(VocabularyMap, source.name),
                )
                for source in fusion.sources
            ]
            yield cls(recipe=recipe, fusion=fusion, sources=(start, *aligned))

    @property
    def role(self) -> str:
        return self.fusion.name

    @property
    def name(self) -> str:
        return self.suffixed(self.fusion.name)

    @property
    def name_key(self) -> tuple[str, str]:
        return ("fusion", "name")

    @property
    def inputs(self) -> tuple[Product, ...]:
        return tuple(product for source in self.sources for product in source.products)

    @property
    def config(self) -> FusionConfig:
        """The recipe's fusion, with the length of a pack."""
        return self.recipe.fusion.model_copy(update={"pack_length": self.recipe.pack_length})

    @property
    def _keys(self) -> dict[str, Any]:
        return {"fusion": self.config, "top_k": self.recipe.top_k, "codec": self.recipe.distributions.codec}

    @property
    def choices(self) -> Mapping[str, Any]:
        return fusion_choices([source.name for source in self.sources], alignment=self.recipe.alignment, **self._keys)

    def identity(self, site: Site) -> Identity:
        return fusion_identity([source.source(site) for source in self.sources], alignment=self.recipe.alignment, **self._keys)

    def description(self, site: OpenSite) -> dict[str, Any]:
        chosen = self.recipe.fusion.model_copy(update={"name": self.name})
        return super().description(site) | {"alignment": self.recipe.alignment.model_dump(), "fusion": chosen.model_dump()}

    def stage(self, site: OpenSite) -> FusionStage:
        return FusionStage(
            site.dataset(self),
            sources=[source.source(site) for source in self.sources],
            alignment=self.recipe.alignment,
            corpus=site.corpus_stage(self).dataset,
            **self._keys,
        )

    def changes(self, stored: Identity, asked: Identity, *, layout: Layout) -> list[str]:
        names = {dataset.fingerprint: dataset.name for dataset in layout.datasets() if dataset.kind == "distributions"}
        were, are = ([names.get(parts[0], f"a missing one ({parts[0][:12]}…)") for parts in each["sources"]] for each in (stored, asked))
        if were != are:
            lines = [f"sources: stored {', '.join(were)}; asked for {', '.join(are)}"]
        else:
            lines = []
            for name, was, now in zip(are, stored["sources"], asked["sources"], strict=True):
                changed = [what for what, before, after in zip(_COMPONENTS, was, now, strict=False) if before != after]
                lines += [f"sources: {name} has changed: {' and '.join(changed)}"] if changed else []
        rest = [{key: value for key, value in identity.items() if key != "sources"} for identity in (stored, asked)]
        return lines + differences(*rest)

    def without_input(self, missing: InputMissing) -> list[str]:
        (source,) = {source.name for source in self.sources if missing.product in source.products}
        state = "there" if isinstance(missing.product, Distributions) else "aligned"
        return [f"sources: asked for {source}, which is not {state} yet"]

    def cost(self, sizes: Sizes) -> Cost:
        target, tokens = sizes.model(self.sources[0].distributions), sizes.tokens(self, "train")
        entries = self.recipe.top_k * entry_bytes(target, codec=self.recipe.distributions.codec)
        return Cost(stored_bytes=tokens * (_TARGET_BYTES + entries), tokens=tokens)
