"""The pipeline of a recipe: what of each stage is missing is made, in order."""

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..align.maps import VocabularyMapStage
from ..ingest.models import ModelFolder
from ..recipe import Recipe
from ..store import catalog, durable, journal
from ..store.errors import FuselineError, UsageError, WorkspaceBusy
from ..store.manifest import Manifest
from ..store.workspace import Workspace
from ..train.config import TrainJob
from ..train.launch import launch
from .conflicts import require_free
from .executor import Executor
from .jobs import Jobs
from .merging import Merging
from .progress import Progress, size
from .stages import Stages
from .training import describe, train
from .work import Stage

_SHOWN = 5  # files of a corpus that are not read, in a message


class Pipeline:
    """Runs the stages of a recipe in a workspace. Each method makes what is missing of its stage and says so if that is nothing."""

    def __init__(
        self, recipe: Recipe, *, base: Path, workspace: Workspace, models_dir: Path, progress: Progress, executor: Callable[[], Executor]
    ) -> None:
        """`base` is the recipe's folder, to which its paths are relative; `models_dir` holds models by the last part of their hub id.

        `executor` is called when parts are to be made: what makes none needs no cluster.
        """
        self.recipe, self.workspace, self.progress = recipe, workspace, progress
        self.stages = Stages(recipe, base=base, workspace=workspace, models_dir=models_dir, say=progress.say)
        self.jobs = Jobs(self.stages)
        name = recipe.merged_name
        self.merging = None if recipe.merge is None or name is None else Merging(self.jobs, config=recipe.merge, name=name)
        self._executor = executor

    def run(self) -> None:
        """Everything that is missing, in order."""
        self.check_models()
        self.make_corpus()
        self._check_identities()
        self.make_distributions()
        self.make_alignments()
        self.make_targets()
        self.train()
        self.evaluate()

    # ---- checks ------------------------------------------------------------------------------------------------------------------------

    def check_models(self) -> None:
        """Refuse models that cannot read the conversations, and a target that cannot be trained as asked, before hours are spent.

        Raises:
            FuselineError: one cannot, or is not to be had or used.
        """
        self.stages.check_readings()
        if self.jobs.all_trained:
            return
        from ..train.families import read_architecture  # loads transformers

        for training in self.recipe.trainings:
            read_architecture(self.stages.models[self.recipe.target.name].folder, training=training.config)

    def _check_identities(self) -> None:
        """Meet every mismatch with what the workspace holds before hours are spent on what comes before it."""
        self.stages.require_domains("fusion", self.recipe.fusion.domain_weights)
        self.stages.require_domains("training", self.recipe.training.domain_weights)
        conflicts = self.stages.fusion_conflicts() + self.jobs.conflicts()  # opens the datasets of all stages up to the fusion
        require_free(conflicts + (self.merging.conflicts() if self.merging else []), workspace=self.workspace)
        for model in self.stages.models.values():
            self.stages.forward(model, kind="evaluations")

    def fold(self) -> None:
        """Bring the catalog up to date; if someone else has it open for long, that is left for later."""
        try:
            catalog.fold(self.workspace)
        except WorkspaceBusy as error:
            self.progress.say(f"The catalog is not up to date yet: {error}")

    # ---- stages that make parts --------------------------------------------------------------------------------------------------------

    def make_corpus(self) -> None:
        """Plan the corpus and make its parts."""
        stage = self.stages.corpus
        splits = sorted({part["split"] for part in stage.plan.parts})
        if "train" not in splits:
            stage.finish()
            raise UsageError(f"The corpus has no split named 'train' to learn from, only: {', '.join(splits)}. Name one so.")
        if self.recipe.evaluation.split not in splits:
            if not stage.dataset.parts():  # nothing was made of this plan: let another take its place
                durable.remove(stage.dataset.folder)
            fraction = self.recipe.corpus.held_out_fraction
            if fraction and self.recipe.evaluation.split == "test":
                raise UsageError(
                    f"corpus.held_out_fraction ({fraction}) of {stage.plan.summary['documents']} documents holds out none. Raise it."
                )
            raise UsageError(
                f"evaluation.split ({self.recipe.evaluation.split!r}) must be one of the corpus's splits ({', '.join(splits)}). "
                "Hold out some documents, for example with corpus.held_out_fraction = 0.05, or name the files of each split in "
                "[corpus.splits], or set evaluation.split to a split other than train."
            )
        summary = stage.plan.summary
        left_out = [f"{summary[reason]:,} {reason}" for reason in ("duplicates", "empty", "refused") if summary.get(reason)]
        self.progress.say(
            f"corpus {self.recipe.corpus.name}: {summary['documents']:,} documents, {size(summary['text_bytes'])} of text, "
            f"{len(summary['parts'])} parts" + (f" (left out: {', '.join(left_out)})" if left_out else "")
        )
        if summary.get("refused"):
            self.progress.say(f"refused: {summary['why_refused'][0]} (more in {stage.dataset.folder / 'plan.json'})")
        self.progress.say(f"corpus {self.recipe.corpus.name}: read from {stage.source.where} ({stage.source.size})")
        if unread := stage.source.left_out:
            shown = ", ".join(unread[:_SHOWN]) + (f" and {len(unread) - _SHOWN} more" if len(unread) > _SHOWN else "")
            self.progress.say(f"corpus {self.recipe.corpus.name}: not read: {shown}")
        self.make_corpus_parts(stage.parts())

    def make_corpus_parts(self, parts: list[int]) -> None:
        """Make what is missing of these parts of the corpus, with its texts at hand meanwhile."""
        stage = self.stages.corpus
        if stage.dataset.missing(parts):
            stage.prepare()
        self.make("corpus", stage, parts=parts)
        stage.finish()

    def make_distributions(self) -> None:
        """Every model's distributions on the train split."""
        parts = self.stages.parts_of("train")
        for model in self.stages.models.values():
            self.make(f"distributions {model.config.name}", self.stages.forward(model), parts=parts)

    def make_alignments(self) -> None:
        """The vocabulary map and the position maps of each source to the target."""
        parts = self.stages.parts_of("train")
        for dataset in self.stages.distributions.values():
            self.stages.require(dataset, parts=parts, command="ingest distributions")
        for source in self.recipe.sources:
            for title, stage in self.stages.alignment_stages(source):
                self.make(title, stage, parts=[0] if isinstance(stage, VocabularyMapStage) else parts)

    def make_targets(self) -> None:
        """The fused targets."""
        parts = self.stages.parts_of("train")
        self.stages.require_domains("fusion", self.recipe.fusion.domain_weights)
        for stage in self.stages.fusions:
            for source in stage.sources:
                for dataset, needed, command in (
                    (source.distributions, parts, "ingest distributions"),
                    (source.alignment, parts, "align"),
                    (source.vocabulary_map, [0], "align"),
                ):
                    if dataset is not None:
                        self.stages.require(dataset, parts=needed, command=command)
            self.make(f"targets {stage.dataset.name}", stage, parts=parts)

    # ---- training, merging and evaluation ----------------------------------------------------------------------------------------------

    def train(self, *, names: Sequence[str] | None = None) -> None:
        """Train on the fused targets, and the baseline; `names` chooses among them."""
        for job in self._jobs_to_train(names):
            self._train(job)

    def prepare_training(self, *, names: Sequence[str] | None = None) -> None:
        """Write the job files alone, for ranks that somebody else starts."""
        for job in self._jobs_to_train(names):
            job.save()
            self.progress.say(
                f"{describe(job)}\ntraining {job.config.name} is prepared. On one machine, start them with:\n"
                f"  torchrun --nproc-per-node {job.config.world_size} -m fuseline.train {shlex.quote(str(job.run_folder))}"
            )

    def _jobs_to_train(self, names: Sequence[str] | None) -> list[TrainJob]:
        """The trainings whose targets are all there; the text that they are evaluated on is made if it is missing."""
        parts, fusions = self.stages.parts_of("train"), {stage.dataset.name: stage.dataset for stage in self.stages.fusions}
        for training in self.recipe.trainings:
            if names is None or training.name in names:
                self.stages.require(fusions[training.fusion.name], parts=parts, command="fuse")
        self._make_held_out()
        return self.jobs.chosen(names)

    def _make_held_out(self) -> None:
        """The start's own evaluation, whose text the trainings are evaluated on."""
        if self.recipe.training.evaluate_every is not None and not self.jobs.all_trained:
            self._evaluate(self.stages.models[self.recipe.target.name])

    def _train(self, job: TrainJob) -> None:
        name = job.config.name
        if self.jobs.is_trained(name):
            launch(job, on_metrics=lambda record: None)  # checks that it is the same training
            self.progress.say(f"training {name}: nothing to do")
            return
        train(job, workspace=self.workspace, progress=self.progress, fold=self.fold)
        self.fold()
        self.progress.say(f"training {name}: model written to {job.export_folder}")

    def merge(self) -> None:
        """The merged model, where the recipe has one; its trainings must be done."""
        if self.merging is None:
            if self.recipe.merge is not None:
                self.progress.say(f"merge {self.recipe.merge.name}: nothing to merge, {self.recipe.merge.method} takes two models or more")
            return
        title = f"merge {self.merging.name}"
        if self.merging.is_done():
            self.progress.say(f"{title}: nothing to do")
            return
        self.merging.run(progress=self.progress)
        self.fold()
        self.progress.say(f"{title}: model written to {self.merging.export_folder}")

    def evaluate(self) -> None:
        """The likelihood of the held-out text under every source, the start, and all models that are made; merges them if need be."""
        for model in self.stages.models.values():
            self._evaluate(model)
        self.merge()
        for model in self._made_models():
            self._evaluate(model)

    def _made_models(self) -> list[ModelFolder]:
        return [*self.jobs.models.values(), *([self.merging.model()] if self.merging else [])]

    def _evaluate(self, model: ModelFolder) -> None:
        stage = self.stages.forward(model, kind="evaluations")
        self.make(f"evaluation {model.config.name}", stage, parts=self.stages.parts_of(self.recipe.evaluation.split))

    # ---- repair ------------------------------------------------------------------------------------------------------------------------

    @property
    def trained_evaluations(self) -> set[tuple[str, str]]:
        """Kind and name of the evaluations of the models that the recipe makes, once all are made."""
        if not self._all_made:
            return set()
        return {("evaluations", f"{name}--{self.recipe.evaluation.split}") for name in self.recipe.made_models}

    def trained_stages(self) -> Iterator[tuple[str, Stage]]:
        """The evaluations of the models that the recipe makes, once all are made."""
        if self._all_made:
            for model in self._made_models():
                yield f"evaluation {model.config.name}", self.stages.forward(model, kind="evaluations")

    @property
    def _all_made(self) -> bool:
        return self.jobs.all_trained and (self.merging is None or self.merging.is_there)

    # ---- common ------------------------------------------------------------------------------------------------------------------------

    def make(self, title: str, stage: Stage, *, parts: list[int]) -> None:
        """Make the parts that are missing, and fold them into the catalog.

        Raises:
            DamagedPart: the payload of a committed part is gone.
            FuselineError: parts failed; see `Executor.run`.
        """
        missing = sorted(set(parts) - set(stage.dataset.parts()))
        for part in sorted(set(parts) - set(missing)):
            stage.dataset.require_payload(part)
        if not missing:
            self.progress.say(f"{title}: nothing to do, all {len(parts)} part{'s are' if len(parts) != 1 else ' is'} there")
            return
        started, tokens, stored, quarantined = time.monotonic(), 0, 0, 0
        with (
            self.workspace.run(stage.dataset.kind, name=stage.dataset.name, parameters={"parts": missing}) as run,
            self.progress.stage(title, total=len(missing)) as tracker,
        ):

            def follow(manifest: Manifest) -> None:
                nonlocal tokens, stored, quarantined
                tokens += manifest.counts.get("tokens", 0)
                stored += manifest.n_bytes
                quarantined += manifest.counts.get("quarantined", 0)
                rate = f", {tokens / (time.monotonic() - started):,.0f} tokens/s" if tokens else ""
                tracker(1, f"part {manifest.part}{rate}, {size(stored)} written")
                run.metrics.update(parts=run.metrics.get("parts", 0) + 1, tokens=tokens, stored_bytes=stored, quarantined=quarantined)

            journal.prepare(run.folder)
            try:
                self._executor().run(stage, missing, run_folder=run.folder, on_commit=follow)
            except FuselineError:
                self.fold()  # the parts that did not fail are there
                raise
        self.fold()
        if quarantined:
            self.progress.say(
                f"{title}: {quarantined} document{'s' * (quarantined != 1)} left out; why: fuseline sql "
                f"\"SELECT * FROM quarantine WHERE name = '{stage.dataset.name}'\""
            )
