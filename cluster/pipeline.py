"""The pipeline of a recipe: which datasets it needs, in which order, and what of them is missing."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..align.alignments import AlignmentsStage, alignment_identity
from ..align.config import FusionConfig
from ..align.fusion import FusionStage, fusion_identity
from ..align.maps import VocabularyMapStage, vocabulary_map_identity
from ..align.matches import TokenMatchesStage, matches_identity
from ..align.sources import FusionSource
from ..ingest.corpus import CorpusStage, corpus_identity
from ..ingest.distributions import DistributionsStage, distributions_identity
from ..ingest.models import ModelConfig, ModelFolder, find_model
from ..ingest.sources import find_source
from ..recipe import Recipe
from ..store import catalog, durable, journal
from ..store.corpus_plan import require_domains
from ..store.dataset import Dataset, Manifest, as_ranges
from ..store.errors import FuselineError, UsageError, WorkspaceBusy
from ..store.fingerprint import fingerprint
from ..store.workspace import Workspace
from ..train.config import HeldOut, TrainingConfig, TrainJob
from ..train.launch import launch
from ..train.records import read_done, require_identity
from .conflicts import Conflict, fusion_conflicts, require_free, training_conflicts
from .executor import Executor
from .origin import lineage
from .progress import Progress, size
from .training import describe, train
from .work import Stage


class Pipeline:
    """Runs the stages of a recipe in a workspace. Each method makes what is missing of its stage and says so if that is nothing."""

    def __init__(
        self, recipe: Recipe, *, base: Path, workspace: Workspace, models_dir: Path, progress: Progress, executor: Callable[[], Executor]
    ) -> None:
        """`base` is the recipe's folder, to which its paths are relative; `models_dir` holds models by the last part of their hub id.

        `executor` is called when parts are to be made: what makes none needs no cluster.
        """
        self.recipe, self.base, self.workspace, self.models_dir, self.progress = recipe, base, workspace, models_dir, progress
        self._executor = executor

    def run(self) -> None:
        """Everything that is missing, in order."""
        self._check_trainable()
        self.make_corpus()
        self._check_identities()
        self.make_distributions()
        self.make_alignments()
        self.make_targets()
        self.train()
        self.evaluate()

    # ---- corpus ------------------------------------------------------------------------------------------------------------------------

    @cached_property
    def models(self) -> dict[str, ModelFolder]:
        """The target's start and the sources, by name, found and checked.

        Raises:
            DataError: one is not to be had, or cannot be used.
            UsageError: the corpus's segments would not fit one's context.
        """
        found = {config.name: find_model(config, models_dir=self.models_dir, base=self.base) for config in self.recipe.models}
        context_length = self.recipe.corpus.context_length
        for name, model in found.items():
            longest = model.hf_config.get("max_position_embeddings") or model.hf_config.get("max_seq_len") or context_length
            if context_length > longest:
                raise UsageError(
                    f"corpus.context_length ({context_length}) must be at most the context of {name} ({longest}, by its config.json)."
                )
        return found

    def fold(self) -> None:
        """Bring the catalog up to date; if someone else has it open for long, that is left for later."""
        try:
            catalog.fold(self.workspace)
        except WorkspaceBusy as error:
            self.progress.say(f"The catalog is not up to date yet: {error}")

    def _check_identities(self) -> None:
        """Meet every mismatch with what the workspace holds before hours are spent on what comes before it."""
        self._require_domains("fusion", self.recipe.fusion.domain_weights)
        self._require_domains("training", self.recipe.training.domain_weights)
        conflicts = self._fusion_conflicts()  # opens the datasets of all stages up to the fusion
        for job in self._jobs(self._parts_of("train")):
            key = ("training", "name") if job.config.name == self.recipe.training.name else ("evaluation", "clm_name")
            conflicts += training_conflicts(job, key=key)
        require_free(conflicts, workspace=self.workspace)
        for model in self.models.values():
            self._forward_stage(model, kind="evaluations")

    def _check_trainable(self) -> None:
        """Refuse a target that cannot be trained as asked before hours are spent on its sources."""
        if all(self._is_trained(training) for training in self.recipe.trainings):
            return
        from ..train.families import read_architecture  # loads transformers

        for training in self.recipe.trainings:
            read_architecture(self.models[self.recipe.target.name].folder, training=training)

    @cached_property
    def corpus(self) -> CorpusStage:
        """The stage that makes the corpus."""
        config = self.recipe.corpus
        source = find_source(config.path, revision=config.revision, base=self.base)
        for model in self.models.values():
            self._tokenizer_folder(model)
        identity = corpus_identity(config, source=source, tokenizers=[model.tokenizer for model in self.models.values()])
        folder = self.workspace.folder("corpus", config.name)
        if (folder / "dataset.json").exists():
            # Segments are settled when the corpus is first made: a source that is added later does not undo all that was stored.
            identity["segmented_for"] = Dataset.open(folder).identity["segmented_for"]
        dataset = self.workspace.dataset("corpus", config.name, identity=identity, description={"source": str(source)})
        tokenizer_folders = [self.workspace.folder("tokenizers", digest) for digest in identity["segmented_for"]]
        return CorpusStage(dataset, config=config, source=source, tokenizer_folders=tokenizer_folders)

    def make_corpus(self) -> None:
        """Plan the corpus and make its parts."""
        stage = self.corpus
        splits = sorted({part["split"] for part in stage.plan.parts})
        if "train" not in splits:
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
                "Name one of them, or hold out documents with corpus.held_out_fraction."
            )
        summary = stage.plan.summary
        left_out = [f"{summary[reason]:,} {reason}" for reason in ("duplicates", "empty") if summary[reason]]
        self.progress.say(
            f"corpus {self.recipe.corpus.name}: {summary['documents']:,} documents, {size(summary['text_bytes'])} of text, "
            f"{len(summary['parts'])} parts" + (f" (left out: {', '.join(left_out)})" if left_out else "")
        )
        self.make("corpus", stage, parts=stage.parts())

    def _parts_of(self, split: str) -> list[int]:
        """The corpus's parts of one split.

        Raises:
            UsageError: the corpus is not there yet.
        """
        if not (self.corpus.dataset.folder / "plan.json").exists():
            raise UsageError("The corpus is not there yet. Make it first: fuseline ingest corpus RECIPE.")
        parts = self._planned_parts(split)
        self._require(self.corpus.dataset, parts=parts, command="ingest corpus")
        return parts

    def _planned_parts(self, split: str) -> list[int]:
        return [index for index, part in enumerate(self.corpus.plan.parts) if part["split"] == split]

    def _tokenizer_folder(self, model: ModelFolder) -> Path:
        folder = self.workspace.folder("tokenizers", model.tokenizer.digest)
        model.tokenizer.save(folder)
        return folder

    # ---- distributions -----------------------------------------------------------------------------------------------------------------

    def make_distributions(self) -> None:
        """Every model's distributions on the train split."""
        parts = self._parts_of("train")
        for model in self.models.values():
            self.make(f"distributions {model.config.name}", self._forward_stage(model), parts=parts)

    @cached_property
    def distributions(self) -> dict[str, Dataset]:
        """The distributions of each model, by name."""
        return {name: self._forward_stage(model).dataset for name, model in self.models.items()}

    def _forward_stage(self, model: ModelFolder, *, kind: str = "distributions") -> DistributionsStage:
        """The forward passes of a model: its distributions on the train split, or its likelihoods on the held-out one."""
        recipe = self.recipe
        is_evaluation = kind == "evaluations"
        split = recipe.evaluation.split if is_evaluation else "train"
        dtype = recipe.evaluation.dtype if is_evaluation else model.config.dtype
        name = f"{model.config.name}--{split}" if is_evaluation else model.config.name
        top_k = 0 if is_evaluation else recipe.distributions.top_k
        description = {
            "model": model.config.name,
            "corpus": recipe.corpus.name,
            "split": split,
            "source": model.config.model,
            "model_type": model.hf_config.get("model_type"),
            "vocab_size": model.vocab_size,
            "parameters": model.n_parameters,
        }
        codec = "f16" if is_evaluation else recipe.distributions.codec  # no distribution is stored of an evaluation
        identity = distributions_identity(model, corpus=self.corpus.dataset, split=split, dtype=dtype, top_k=top_k, codec=codec)
        return DistributionsStage(
            self.workspace.dataset(kind, name, identity=identity, description=description),
            corpus=self.corpus.dataset,
            model_folder=model.folder,
            tokenizer_folder=self._tokenizer_folder(model),
            dtype=dtype,
            trust_remote_code=model.config.trust_remote_code,
            top_k=top_k,
            codec=codec,
        )

    # ---- alignment and fusion ----------------------------------------------------------------------------------------------------------

    def make_alignments(self) -> None:
        """The vocabulary map and the position maps of each source to the target."""
        parts = self._parts_of("train")
        for dataset in self.distributions.values():
            self._require(dataset, parts=parts, command="ingest distributions")
        for source in self.recipe.sources:
            for title, stage in self._alignment_stages(source):
                self.make(title, stage, parts=[0] if isinstance(stage, VocabularyMapStage) else parts)

    def make_targets(self) -> None:
        """The fused targets."""
        parts = self._parts_of("train")
        self._require_domains("fusion", self.recipe.fusion.domain_weights)
        stage = self._fusion_stage
        for source in stage.sources:
            for dataset, needed, command in (
                (source.distributions, parts, "ingest distributions"),
                (source.alignment, parts, "align"),
                (source.vocabulary_map, [0], "align"),
            ):
                if dataset is not None:
                    self._require(dataset, parts=needed, command=command)
        self.make(f"targets {self.recipe.fusion.name}", stage, parts=parts)

    @property
    def _of_corpus(self) -> dict[str, Any]:
        return {"corpus": self.recipe.corpus.name}

    def _pair(self, source: ModelConfig) -> str:
        return f"{source.name}--{self.recipe.target.name}"

    def _alignment_stages(self, source: ModelConfig) -> Iterator[tuple[str, Stage]]:
        """The stages that align a source to the target, in order, with their titles."""
        if self.recipe.alignment.vocabulary == "stat":
            yield f"token matches {self._pair(source)}", self._matches_stage(source)
        yield f"vocabulary map {self._pair(source)}", self._vocabulary_stage(source)
        yield f"alignment {self._pair(source)}", self._alignment_stage(source)

    def _sides(self, source: ModelConfig) -> dict[str, Any]:
        """What a stage over a source and the target reads."""
        return {
            "source": self.distributions[source.name],
            "target": self.distributions[self.recipe.target.name],
            "source_tokenizer_folder": self._tokenizer_folder(self.models[source.name]),
            "target_tokenizer_folder": self._tokenizer_folder(self.models[self.recipe.target.name]),
        }

    def _matches_stage(self, source: ModelConfig) -> TokenMatchesStage:
        sides, positions = self._sides(source), self.recipe.alignment.positions
        identity = matches_identity(sides["source"], target=sides["target"], positions=positions)
        name = self.recipe.alignment.matches_name(self._pair(source))
        dataset = self.workspace.dataset("token_matches", name, identity=identity, description=self._of_corpus)
        return TokenMatchesStage(dataset, positions=positions, **sides)

    def _vocabulary_stage(self, source: ModelConfig) -> VocabularyMapStage:
        source_tokenizer, target_tokenizer = (self.models[name].tokenizer for name in (source.name, self.recipe.target.name))
        alignment = self.recipe.alignment
        rule = alignment.vocabulary
        matches = self._matches_stage(source).dataset if rule == "stat" else None
        identity = vocabulary_map_identity(source_tokenizer.digest, target=target_tokenizer.digest, rule=rule, matches=matches)
        dataset = self.workspace.dataset("vocab_maps", alignment.map_name(self._pair(source)), identity=identity)
        parts = self._planned_parts("train") if matches else []
        return VocabularyMapStage(dataset, source=source_tokenizer, target=target_tokenizer, rule=rule, matches=matches, parts=parts)

    def _alignment_stage(self, source: ModelConfig) -> AlignmentsStage:
        sides, alignment = self._sides(source), self.recipe.alignment
        match = alignment.dtw_match if alignment.positions == "dtw" else None
        vocabulary_map = self._vocabulary_stage(source).dataset if alignment.reads_map else None
        identity = alignment_identity(
            sides["source"], target=sides["target"], positions=alignment.positions, match=match, vocabulary_map=vocabulary_map
        )
        name = alignment.alignment_name(self._pair(source))
        dataset = self.workspace.dataset("alignments", name, identity=identity, description=self._of_corpus)
        return AlignmentsStage(dataset, positions=alignment.positions, match=match, vocabulary_map=vocabulary_map, **sides)

    @cached_property
    def _fusion_sources(self) -> list[FusionSource]:
        recipe = self.recipe
        own = FusionSource(name=recipe.target.name, distributions=self.distributions[recipe.target.name])
        return [own] + [
            FusionSource(
                name=source.name,
                distributions=self.distributions[source.name],
                alignment=self._alignment_stage(source).dataset,
                vocabulary_map=self._vocabulary_stage(source).dataset,
            )
            for source in recipe.sources
        ]

    @property
    def _fusion_config(self) -> FusionConfig:
        return self.recipe.fusion.model_copy(update={"pack_length": self.recipe.pack_length})

    @cached_property
    def _fusion_identity(self) -> dict[str, Any]:
        recipe, codec = self.recipe, self.recipe.distributions.codec
        return fusion_identity(
            self._fusion_sources, alignment=recipe.alignment, fusion=self._fusion_config, top_k=recipe.top_k, codec=codec
        )

    def _fusion_conflicts(self) -> list[Conflict]:
        return fusion_conflicts(self.workspace, name=self.recipe.fusion.name, identity=self._fusion_identity)

    @cached_property
    def _fusion_stage(self) -> FusionStage:
        recipe = self.recipe
        require_free(self._fusion_conflicts(), workspace=self.workspace)
        described = self._of_corpus | {"alignment": recipe.alignment.model_dump(), "fusion": recipe.fusion.model_dump()}
        return FusionStage(
            self.workspace.dataset("targets", recipe.fusion.name, identity=self._fusion_identity, description=described),
            sources=self._fusion_sources,
            alignment=recipe.alignment,
            fusion=self._fusion_config,
            top_k=recipe.top_k,
            codec=recipe.distributions.codec,
            corpus=self.corpus.dataset,
        )

    # ---- training and evaluation -------------------------------------------------------------------------------------------------------

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
                f"  torchrun --nproc-per-node {job.config.world_size} -m fuseline.train {job.run_folder}"
            )

    def _jobs_to_train(self, names: Sequence[str] | None) -> list[TrainJob]:
        """The trainings whose targets are all there; the text that they are evaluated on is made if it is missing."""
        parts = self._parts_of("train")
        self._require(self._fusion_stage.dataset, parts=parts, command="fuse")
        self._make_held_out()
        return self._jobs(parts, names=names)

    def _make_held_out(self) -> None:
        """The start's own evaluation, whose text the trainings are evaluated on."""
        if self.recipe.training.evaluate_every is not None and not all(map(self._is_trained, self.recipe.trainings)):
            start = self.models[self.recipe.target.name]
            self.make(f"evaluation {start.config.name}", self._forward_stage(start, kind="evaluations"), parts=self._held_out_parts)

    @property
    def _held_out_parts(self) -> list[int]:
        return self._parts_of(self.recipe.evaluation.split)

    def _held_out(self) -> HeldOut | None:
        if self.recipe.training.evaluate_every is None:
            return None
        dataset = self._forward_stage(self.models[self.recipe.target.name], kind="evaluations").dataset
        return HeldOut(folder=dataset.folder.absolute(), parts=self._held_out_parts)

    def _jobs(self, parts: list[int], *, names: Sequence[str] | None = None) -> list[TrainJob]:
        return [self._job(training, parts=parts) for training in self.recipe.trainings if names is None or training.name in names]

    def _train(self, job: TrainJob) -> None:
        training = job.config
        if self._is_trained(training):
            launch(job, on_metrics=lambda record: None)  # checks that it is the same training
            self.progress.say(f"training {training.name}: nothing to do")
            return
        train(job, workspace=self.workspace, progress=self.progress, fold=self.fold)
        self.fold()
        self.progress.say(f"training {training.name}: model written to {job.export_folder}")

    def _is_trained(self, training: TrainingConfig) -> bool:
        done, exported = self.workspace.folder("runs", training.name) / "done.json", self.workspace.folder("exports", training.name)
        return done.exists() and (exported / "config.json").exists()

    def _job(self, training: TrainingConfig, *, parts: list[int]) -> TrainJob:
        targets_fingerprint = fingerprint(self._fusion_identity)
        start = self.models[self.recipe.target.name]
        return TrainJob(
            run_folder=self.workspace.folder("runs", training.name).absolute(),
            model_folder=start.folder.absolute(),
            model_fingerprint=start.weights_digest,
            targets_folder=self.workspace.folder("targets", self.recipe.fusion.name).absolute(),
            targets_fingerprint=targets_fingerprint,
            tokens_fingerprint=self.distributions[self.recipe.target.name].fingerprint,
            parts=parts,
            corpus_folder=self.corpus.dataset.folder.absolute(),
            held_out=self._held_out(),
            export_folder=self.workspace.folder("exports", training.name).absolute(),
            lineage=lineage(self.recipe, models=self.models, corpus=self.corpus.dataset, targets_fingerprint=targets_fingerprint),
            config=training,
        )

    def evaluate(self) -> None:
        """The likelihood of the held-out text under every source, the start, and the trained models."""
        for model in [*self.models.values(), *self._trained_models()]:
            stage = self._forward_stage(model, kind="evaluations")
            self.make(f"evaluation {model.config.name}", stage, parts=self._held_out_parts)

    def _trained_models(self) -> list[ModelFolder]:
        found = []
        for training in self.recipe.trainings:
            folder = self.workspace.folder("exports", training.name)
            if not self._is_trained(training):
                raise UsageError(f"The model {training.name} is not trained yet. Train it first: fuseline train RECIPE.")
            job = self._job(training, parts=self._parts_of("train"))
            done = read_done(job.run_folder)
            require_identity(job.run_folder, stored=done["identity"] if done else {}, asked=job.identity)
            config = self.recipe.target.model_copy(update={"name": training.name, "model": str(folder), "revision": None})
            found.append(ModelFolder(config, folder).check())
        return found

    # ---- repair ------------------------------------------------------------------------------------------------------------------------

    def stages(self) -> Iterator[tuple[str, Stage]]:
        """The stages that make parts and need no trained model, in order, with their titles; all of their datasets are opened."""
        yield "corpus", self.corpus
        for model in self.models.values():
            yield f"distributions {model.config.name}", self._forward_stage(model)
        for source in self.recipe.sources:
            yield from self._alignment_stages(source)
        yield f"targets {self.recipe.fusion.name}", self._fusion_stage
        for model in self.models.values():
            yield f"evaluation {model.config.name}", self._forward_stage(model, kind="evaluations")

    @property
    def trained_evaluations(self) -> set[tuple[str, str]]:
        """Kind and name of the evaluations of the trained models, once all are."""
        if not all(map(self._is_trained, self.recipe.trainings)):
            return set()
        return {("evaluations", f"{training.name}--{self.recipe.evaluation.split}") for training in self.recipe.trainings}

    def trained_stages(self) -> Iterator[tuple[str, Stage]]:
        """The evaluations of the trained models, once all are."""
        if all(map(self._is_trained, self.recipe.trainings)):
            for model in self._trained_models():
                yield f"evaluation {model.config.name}", self._forward_stage(model, kind="evaluations")

    # ---- common ------------------------------------------------------------------------------------------------------------------------

    def _require_domains(self, section: str, weights: Iterable[str]) -> None:
        require_domains(weights, field=f"{section}.domain_weights", known=self.corpus.plan.documents["domain"].unique())

    def _require(self, dataset: Dataset, *, parts: list[int], command: str) -> None:
        missing = dataset.missing(parts)
        if missing:
            raise UsageError(
                f"{dataset.kind}/{dataset.name} lacks {len(missing)} of {len(parts)} parts ({as_ranges(missing)}). "
                f"First: fuseline {command} RECIPE."
            )

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
