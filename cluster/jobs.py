"""The trainings of a recipe: what each learns from, which are done, and the models that came of them."""

from collections.abc import Sequence
from functools import cached_property

from ..ingest.models import ModelFolder
from ..recipe import Training
from ..store.errors import UsageError
from ..store.fingerprint import fingerprint
from ..train.config import HeldOut, TrainJob
from ..train.records import read_done, require_identity
from .conflicts import Conflict, training_conflicts
from .origin import lineage
from .stages import Stages


class Jobs:
    """The trainings of a recipe in a workspace."""

    def __init__(self, stages: Stages) -> None:
        """`stages` make what is learned from."""
        self.stages, self.recipe, self.workspace = stages, stages.recipe, stages.workspace

    def chosen(self, names: Sequence[str] | None = None) -> list[TrainJob]:
        """The trainings of these names, or all, in the recipe's order; the corpus must be there."""
        return [self.job(training) for training in self.recipe.trainings if names is None or training.name in names]

    def job(self, training: Training) -> TrainJob:
        """Everything that the ranks of a training need to know."""
        stages, config = self.stages, training.config
        start, distributions = stages.models[self.recipe.target.name], stages.distributions[self.recipe.target.name]
        targets_fingerprint = fingerprint(stages.fusion_identity(training.fusion))
        return TrainJob(
            run_folder=self.workspace.folder("runs", config.name).absolute(),
            model_folder=start.folder.absolute(),
            model_fingerprint=start.start_digest,
            targets_folder=self.workspace.folder("targets", training.fusion.name).absolute(),
            targets_fingerprint=targets_fingerprint,
            tokens_fingerprint=distributions.fingerprint,
            start_folder=distributions.folder.absolute(),
            parts=stages.parts_of("train"),
            corpus_folder=stages.corpus.dataset.folder.absolute(),
            held_out=self._held_out(),
            export_folder=self.workspace.folder("exports", config.name).absolute(),
            chat_template=stages.chat_template,
            lineage=lineage(training, recipe=self.recipe, models=stages.models, corpus=stages.corpus.dataset, targets=targets_fingerprint),
            config=config,
        )

    def _held_out(self) -> HeldOut | None:
        if self.recipe.training.evaluate_every is None:
            return None
        start = self.stages.models[self.recipe.target.name]
        dataset = self.stages.forward(start, kind="evaluations").dataset
        return HeldOut(folder=dataset.folder.absolute(), parts=self.stages.parts_of(self.recipe.evaluation.split))

    def conflicts(self) -> list[Conflict]:
        """Trainings of the recipe's names that are others."""
        found = []
        for training in self.recipe.trainings:
            section, key = training.key
            recipe_name = getattr(getattr(self.recipe, section), key)
            found += training_conflicts(self.job(training), key=training.key, recipe_name=recipe_name)
        return found

    def is_trained(self, name: str) -> bool:
        """Whether a training of this name is done and its model exported; whether it is the same training, `models` checks."""
        done, exported = self.workspace.folder("runs", name) / "done.json", self.workspace.folder("exports", name)
        return done.exists() and (exported / "config.json").exists()

    @property
    def all_trained(self) -> bool:
        """Whether nothing is left to train."""
        return all(self.is_trained(training.name) for training in self.recipe.trainings)

    @cached_property
    def models(self) -> dict[str, ModelFolder]:
        """The trained models, by name of their training.

        Raises:
            UsageError: one is not trained yet.
            FingerprintMismatch: one is of another training than the recipe's.
        """
        found = {}
        for training in self.recipe.trainings:
            if not self.is_trained(training.name):
                raise UsageError(f"The model {training.name} is not trained yet. Train it first: fuseline train RECIPE.")
            job = self.job(training)
            done = read_done(job.run_folder)
            require_identity(job.run_folder, stored=done["identity"] if done else {}, asked=job.identity)
            found[training.name] = self.exported(training.name)
        return found

    def exported(self, name: str) -> ModelFolder:
        """A model of the target's shape that was made here, checked."""
        folder = self.workspace.folder("exports", name)
        config = self.recipe.target.model_copy(update={"name": name, "model": str(folder), "revision": None})
        return ModelFolder(config, folder).check()
