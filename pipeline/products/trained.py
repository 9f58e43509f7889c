"""Trainings: on fused targets, and the baseline on text alone."""

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...ingest.models import ModelFolder
from ...store.errors import UsageError
from ...store.fingerprint import Identity, fingerprint
from ...store.layout import Layout
from ...train.config import HeldOut, TrainingConfig, TrainJob
from ...train.records import last_checkpoint, read_done, require_identity
from ..origin import lineage
from ..recipe import Training
from .corpus import Corpus
from .cost import Cost, Sizes
from .forward import Distributions, Evaluation
from .fused import Targets
from .product import AtLeast, Drawing, InputMissing, OpenSite, PartsProduct, Product, Site, opened

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # per weight
_STATE_BYTES = 12  # per parameter of a checkpoint, in addition to the weight: a float32 master and two moments


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelProduct(Product):
    """A model of the target's shape that a recipe makes: `exports/<name>`."""

    def export_folder(self, layout: Layout) -> Path:
        """Folder of the model in the Hugging Face format."""
        return layout.folder("exports", self.name)

    def exported(self, layout: Layout) -> ModelFolder:
        """Check and return the stored model."""
        folder = self.export_folder(layout)
        config = self.recipe.target.model_copy(update={"name": self.name, "model": str(folder), "revision": None})
        return ModelFolder(config, folder).check()

    @abstractmethod
    def finished_identity(self, layout: Layout) -> Identity | None:
        """Identity of the stored model of this name; None if there is none."""

    @abstractmethod
    def require_same(self, site: OpenSite) -> None:
        """Raise FingerprintMismatch if the stored model is not this one."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Trained(ModelProduct):
    """A training and its model."""

    kind: ClassVar[str] = "training"
    command: ClassVar[str] = "train"
    noun: ClassVar[str] = "training"

    training: Training
    of_corpus: Corpus
    start: Distributions  # distributions of the target's start
    targets: Targets | None  # None for a training on text alone, which reads the tokens from `start`
    held_out: Evaluation | None  # the data on which the training is evaluated

    @classmethod
    def of(cls, drawing: Drawing) -> Iterator["Trained"]:
        recipe = drawing.recipe
        for training in recipe.trainings:
            yield cls(
                recipe=recipe,
                training=training,
                of_corpus=drawing.get(Corpus, ""),
                start=drawing.get(Distributions, recipe.target.name),
                targets=drawing.get(Targets, training.fusion.name) if training.config.uses_targets else None,
                held_out=None if training.config.evaluate_every is None else drawing.get(Evaluation, recipe.target.name),
            )

    @property
    def role(self) -> str:
        return self.training.name

    @property
    def name(self) -> str:
        return self.suffixed(self.training.name)

    @property
    def name_key(self) -> tuple[str, str]:
        return self.training.key

    @property
    def config(self) -> TrainingConfig:
        """The settings, with the name."""
        return self.training.config.model_copy(update={"name": self.name})

    @property
    def inputs(self) -> tuple[Product, ...]:
        return tuple(needed for needed in (self.of_corpus, self.start, self.targets, self.held_out) if needed is not None)

    @property
    def learned_from(self) -> PartsProduct:
        """The targets; for a training on text alone, the distributions with its tokens."""
        return self.start if self.targets is None else self.targets

    @property
    def determining(self) -> tuple[Product, ...]:
        return (self.learned_from,)

    @property
    def choices(self) -> Mapping[str, Any]:
        return {"config": self.config.determines, "start": self.start.choices["of"]}

    def identity(self, site: Site) -> Identity:
        place = opened(site)
        if place is None:
            known = {"config": json.loads(json.dumps(self.config.determines)), "targets": site.dataset(self.learned_from).fingerprint}
            return AtLeast(known)
        return self.job(place).identity

    def job(self, site: OpenSite) -> TrainJob:
        """All data that the ranks need; the corpus must be there."""
        recipe, layout = site.recipes(self)[0], site.layout
        models, distributions = site.models(recipe), site.dataset(self.start)
        model = models[recipe.target.name]
        learned = fingerprint(site.identity(self.learned_from))
        corpus = site.dataset(self.of_corpus)
        held_out = None
        if self.held_out is not None:
            held_out = HeldOut(folder=self.held_out.folder(layout).absolute(), parts=site.parts(self.held_out))
        template = site.template(self.of_corpus)
        chat = recipe.corpus.chat
        return TrainJob(
            run_folder=self.run_folder(layout).absolute(),
            model_folder=model.folder.absolute(),
            model_fingerprint=model.start_digest,
            targets_folder=self.learned_from.folder(layout).absolute(),
            targets_fingerprint=learned,
            tokens_fingerprint=distributions.fingerprint,
            start_folder=distributions.folder.absolute(),
            parts=site.parts(self.start),
            corpus_folder=corpus.folder.absolute(),
            held_out=held_out,
            export_folder=self.export_folder(layout).absolute(),
            # If the recipe names none, the export has the start's own template.
            chat_template=template.template.source if template is not None and chat is not None and chat.template is not None else None,
            lineage=lineage(
                None if self.targets is None else self.targets.name,
                sources=self.training.fusion.sources,
                recipe=recipe,
                models=models,
                corpus=corpus,
                targets=learned,
            ),
            config=self.config,
        )

    def run_folder(self, layout: Layout) -> Path:
        """Folder of checkpoints, metrics and logs."""
        return layout.folder("runs", self.name)

    def folders(self, layout: Layout) -> list[Path]:
        return [self.run_folder(layout), self.export_folder(layout)]

    def is_done(self, layout: Layout) -> bool:
        return (self.run_folder(layout) / "done.json").exists() and (self.export_folder(layout) / "config.json").exists()

    def finished_identity(self, layout: Layout) -> Identity | None:
        done = read_done(self.run_folder(layout))
        return None if done is None else done["identity"]

    def stored_identity(self, layout: Layout) -> Identity | None:
        """Identity of a training of this name that is finished or has checkpoints; None if there is nothing to keep."""
        folder, finished = self.run_folder(layout), self.finished_identity(layout)
        if finished is None and (folder / "job.json").exists() and last_checkpoint(folder) is not None:
            return TrainJob.read(folder).identity
        return finished

    def require_done(self, site: OpenSite) -> None:
        if not self.is_done(site.layout):
            raise UsageError(f"Train the model {self.name} first: fuseline train RECIPE. It is not trained yet.")

    def require_same(self, site: OpenSite) -> None:
        self.require_done(site)
        require_identity(self.run_folder(site.layout), stored=self.finished_identity(site.layout) or {}, asked=site.identity(self))

    def changes(self, stored: Identity, asked: Identity, *, layout: Layout) -> list[str]:
        found = super().changes(stored, asked, layout=layout)
        if isinstance(asked, AtLeast) and found and all(line.startswith("targets: ") for line in found):
            return [f"was trained on other data than {self.learned_from.kind}/{self.learned_from.name}"]
        return found

    def without_input(self, missing: InputMissing) -> list[str]:
        return [f"was trained on other data than {self.learned_from.kind}/{self.learned_from.name}"]

    def cost(self, sizes: Sizes) -> Cost:
        config, target = self.config, sizes.model(self.start)
        if config.steps is None:
            trained = sizes.tokens(self.start, "train") * (config.epochs or 1)
        else:
            trained = float(config.steps * config.global_batch_size * config.sequence_length)
        item = ITEM_BYTES[config.dtype]
        return Cost(
            tokens=trained,
            stored_bytes=(config.keep_checkpoints * (item + _STATE_BYTES) + item) * target.parameters,
            flops=6 * target.parameters * trained,
            dtype=config.dtype,
            remark=f"TP {config.tensor_parallel} × DP {config.data_parallel}",
        )
