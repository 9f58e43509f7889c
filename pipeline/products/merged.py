"""The merged model: models that were each trained with one source are merged in parameter space (FuseChat, arXiv:2408.07990)."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...ingest.models import ModelFolder
from ...store.errors import FingerprintMismatch
from ...store.fingerprint import Identity, differences, fingerprint
from ...store.json_files import read_object
from ...store.layout import Layout
from ...train.merging.config import MergeConfig
from ...train.merging.identity import REPORT, merge_identity
from ..origin import merged_lineage
from .cost import Cost, Sizes
from .forward import Distributions
from .product import AtLeast, Drawing, InputMissing, OpenSite, Product, Site, opened
from .trained import ITEM_BYTES, ModelProduct, Trained


@dataclass(frozen=True, eq=False, kw_only=True)
class Merged(ModelProduct):
    """`exports/<merge>-<number of models>`.

    Its identity has the models' trainings, not only their weights. A merged model of different sources is thus reported before any training
    starts.
    """

    kind: ClassVar[str] = "merge"
    command: ClassVar[str] = "eval"
    noun: ClassVar[str] = "merge"

    trainings: tuple[tuple[str, Trained], ...]  # by the name of the source of each
    start: Distributions  # of the target's start

    @classmethod
    def of(cls, drawing: Drawing) -> Iterator["Merged"]:
        recipe = drawing.recipe
        if recipe.merged_name is not None:
            trainings = tuple((source, drawing.get(Trained, training.name)) for source, training in recipe.merged_trainings.items())
            yield cls(recipe=recipe, trainings=trainings, start=drawing.get(Distributions, recipe.target.name))

    @property
    def role(self) -> str:
        return ""

    @property
    def config(self) -> MergeConfig:
        """Method and settings."""
        assert self.recipe.merge is not None
        return self.recipe.merge

    @property
    def name(self) -> str:
        return self.suffixed(str(self.recipe.merged_name))

    @property
    def name_key(self) -> tuple[str, str]:
        return ("merge", "name")

    @property
    def inputs(self) -> tuple[Product, ...]:
        return tuple(training for _, training in self.trainings)

    @property
    def determining(self) -> tuple[Product, ...]:
        return tuple(training for _, training in sorted(self.trainings, key=lambda item: item[0]))  # their order makes no difference

    @property
    def choices(self) -> Mapping[str, Any]:
        return {"settings": self.config.determines(sorted(source for source, _ in self.trainings))}

    def _planned(self, *, base: str, trainings: Mapping[str, str]) -> dict[str, Any]:
        """The part of the identity that is known before training: `base` is the start's digest, `trainings` are fingerprints."""
        identity = merge_identity(self.config, base=base, models=dict.fromkeys(trainings, ""))
        return {key: value for key, value in identity.items() if key != "models"} | {"trainings": dict(sorted(trainings.items()))}

    def planned(self, site: Site) -> Identity:
        """The part of the identity that is known before training.

        Raises:
            InputMissing: the models are not opened, and a training is not done.
        """
        place = opened(site)
        if place is not None:
            trainings = {source: fingerprint(site.identity(training)) for source, training in self.trainings}
            return AtLeast(self._planned(base=self.base(place).weights_digest, trainings=trainings))
        found, bases = {}, set()
        for source, training in self.trainings:
            done = training.finished_identity(site.layout)
            if done is None or training.changes(done, site.identity(training), layout=site.layout):
                raise InputMissing(training)
            found[source] = fingerprint(done)
            bases.add(done["model"])
        return AtLeast(self._planned(base=min(bases), trainings=found))

    def identity(self, site: Site) -> Identity:
        place = opened(site)
        if place is None:
            return self.planned(site)
        digests = {name: model.weights_digest for name, model in self.models(place).items()}
        return dict(self.planned(site)) | merge_identity(self.config, base=self.base(place).weights_digest, models=digests)

    def base(self, site: OpenSite) -> ModelFolder:
        """The target's start."""
        recipe = site.recipes(self)[0]
        return site.models(recipe)[recipe.target.name]

    def models(self, site: OpenSite) -> dict[str, ModelFolder]:
        """The models to merge, by the name of the source of each."""
        return {source: site.exported(training) for source, training in self.trainings}

    def lineage(self, site: OpenSite) -> dict[str, Any]:
        """The origin of the model, for its card."""
        recipe = site.recipes(self)[0]
        trainings = {source: training.job(site).lineage for source, training in self.trainings}
        corpus = site.corpus_stage(self.start).dataset
        return merged_lineage(trainings, recipe=recipe, models=site.models(recipe), corpus=corpus, merged=self.models(site))

    def folders(self, layout: Layout) -> list[Path]:
        return [self.export_folder(layout)]

    def is_done(self, layout: Layout) -> bool:
        return (self.export_folder(layout) / "config.json").exists()

    def finished_identity(self, layout: Layout) -> Identity | None:
        """The identity of the stored model; empty if it is not a merge."""
        folder = self.export_folder(layout)
        if not folder.exists():
            return None
        try:
            return dict(read_object(folder / REPORT)["identity"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def require_same(self, site: OpenSite) -> None:
        stored = self.finished_identity(site.layout)
        changed = [] if stored is None else self.changes(stored, site.identity(self), layout=site.layout)
        if changed:
            raise FingerprintMismatch(f"exports/{self.name} was made from different inputs:\n  " + "\n  ".join(changed))

    def changes(self, stored: Identity, asked: Identity, *, layout: Layout) -> list[str]:
        if not stored:
            return [f"is no merge: {REPORT} cannot be read"]
        asked = json.loads(json.dumps(asked))
        return differences({key: stored.get(key, {}) for key in asked}, asked)

    def without_input(self, missing: InputMissing) -> list[str]:
        return [f"trainings: asked for {missing.product.name}, which is not there yet, or was made from different inputs"]

    def cost(self, sizes: Sizes) -> Cost:
        item = ITEM_BYTES[self.config.dtype or self.recipe.training.dtype]
        remark = f"{self.config.method} of {len(self.trainings)}"
        return Cost(stored_bytes=item * sizes.model(self.start).parameters, remark=remark)
