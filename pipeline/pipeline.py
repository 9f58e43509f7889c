"""The pipeline of a recipe: it makes the missing products of the graph, in order."""

import shlex
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from ..ingest.corpus import CorpusStage
from ..store import catalog, durable, journal
from ..store.errors import FuselineError, UsageError, WorkspaceBusy
from ..store.manifest import Manifest
from ..store.workspace import Workspace
from ..train.launch import launch
from .conflicts import conflicts, require_free
from .executors.executor import Executor
from .executors.work import Stage
from .graph import products
from .merging import merge
from .opened import Opened
from .products.corpus import Corpus
from .products.forward import Distributions
from .products.merged import Merged
from .products.product import PartsProduct, Product
from .products.trained import Trained
from .progress import Progress, size
from .recipe import Recipe
from .training import describe, train

_SHOWN = 5  # unread files of a corpus that a message lists


class Pipeline:
    """Makes the products of a recipe in a workspace. Each method makes what is missing, and reports if nothing is missing."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        base: Path,
        workspace: Workspace,
        models_dir: Path,
        progress: Progress,
        executor: Callable[[], Executor],
        variant: str | None = None,
    ) -> None:
        """Open a pipeline.

        Args:
            recipe: the recipe with its variants.
            base: the recipe's folder, to which its paths are relative.
            workspace: where everything is made.
            models_dir: folder with models, by the last part of their hub id.
            progress: shows what is done.
            executor: called when parts must be made, so that other commands need no cluster.
            variant: if given, only what this variant needs is made.

        Raises:
            UsageError: the recipe does not have the variant.
        """
        self.recipe, self.workspace, self.progress = recipe, workspace, progress
        graph = products(recipe)
        self.graph = graph if variant is None else graph.only(variant)
        self.site = Opened(self.graph, base=base, workspace=workspace, models_dir=models_dir, executor=recipe.executor, say=progress.say)
        self._executor = executor

    def run(self) -> None:
        """Make everything that is missing, in order."""
        self.check_models()
        for corpus in self.graph.of_kind(Corpus):
            self._make(corpus)
        self._check_identities()
        for product in self.graph:
            if not isinstance(product, Corpus):
                self._make(product)
        self._say_what_is_not_merged()

    def make(self, command: str, *, names: Collection[str] | None = None) -> None:
        """Make the products of one command. Their inputs must be there.

        Args:
            command: `align`, `train`, …: `Product.command`.
            names: names of the products to make; by default all.

        Raises:
            UsageError: an input is missing; the text names the command that makes it.
        """
        chosen = [product for product in self.graph if product.command == command and (names is None or product.name in names)]
        self._check_domains(command)
        self._require_names(chosen)
        for product in chosen:
            self.site.require_inputs(product, but=chosen)
        for product in chosen:
            self._make_inputs(product)
            self._make(product)
        if command == Merged.command:
            self._say_what_is_not_merged()

    # ---- checks ------------------------------------------------------------------------------------------------------------------------

    def check_models(self) -> None:
        """Check before long computations that all models can read the conversations, and that the target can be trained.

        Raises:
            FuselineError: a model cannot, is not available, or cannot be used.
        """
        self.site.check_readings()
        trainings = self.graph.of_kind(Trained)
        if all(training.is_done(self.workspace) for training in trainings):
            return
        from ..train.families import read_architecture  # loads transformers

        for training in trainings:
            recipe = self.site.recipes(training)[0]
            start = self.site.models(recipe)[recipe.target.name]
            read_architecture(start.folder, training=training.config)

    def _check_identities(self) -> None:
        """Raise every mismatch with the workspace before long computations start."""
        self._check_domains("fuse")
        self._check_domains("train")
        require_free(conflicts(self.site), layout=self.workspace)
        for product in self.graph:
            if isinstance(product, PartsProduct) and not self.graph.needs_made_model(product):
                self.site.dataset(product)

    def _require_names(self, chosen: Collection[Product]) -> None:
        """Raise FingerprintMismatch if the workspace has different data under the name of one of these, or of one of their inputs."""
        if all(isinstance(product, Corpus | Distributions) for product in chosen):
            return  # these need no targets yet
        among = dict.fromkeys(each for product in chosen for each in (*product.inputs, product))
        require_free(conflicts(self.site, among=among), layout=self.workspace)

    def _check_domains(self, command: str) -> None:
        sections = {"fuse": "fusion", "train": "training"}
        if command in sections:
            for corpus in self.graph.of_kind(Corpus):
                for recipe in self.site.recipes(corpus):
                    section = sections[command]
                    self.site.require_domains(section, corpus, getattr(recipe, section).domain_weights)

    def _make_inputs(self, product: Product) -> None:
        """Make the inputs of a product that are made on demand."""
        for needed in product.inputs:
            if needed.is_made_on_demand and not product.is_done(self.workspace):
                self._make(needed)

    def fold(self) -> None:
        """Update the catalog. If another process has it open for long, leave the update for later."""
        try:
            catalog.fold(self.workspace)
        except WorkspaceBusy as error:
            self.progress.say(f"The catalog is not up to date yet: {error}")

    # ---- making ------------------------------------------------------------------------------------------------------------------------

    def _make(self, product: Product) -> None:
        """Make the missing parts of a product."""
        match product:
            case Corpus():
                self._make_corpus(product)
            case PartsProduct():
                self.make_parts(product, parts=self.site.parts(product))
            case Trained():
                self._train(product)
            case Merged():
                self._merge(product)

    def _make_corpus(self, product: Corpus) -> None:
        """Plan the corpus and make its parts."""
        stage, config = self.site.corpus_stage(product), product.recipe.corpus
        splits = sorted({part["split"] for part in stage.plan.parts})
        if "train" not in splits:
            stage.finish()
            raise UsageError(
                f"Rename one split of the corpus to 'train', from which the model learns. Its splits are: {', '.join(splits)}."
            )
        for split in (recipe.evaluation.split for recipe in self.site.recipes(product)):
            if split in splits:
                continue
            if not stage.dataset.parts():  # no part uses this plan: allow another one
                durable.remove(stage.dataset.folder)
            fraction = config.held_out_fraction
            if fraction and split == "test":
                raise UsageError(
                    f"Increase corpus.held_out_fraction ({fraction}): it holds out none of {stage.plan.summary['documents']} documents."
                )
            raise UsageError(
                f"evaluation.split ({split!r}) must be one of the corpus's splits ({', '.join(splits)}). "
                "Hold out documents, for example with corpus.held_out_fraction = 0.05, or name the files of each split in "
                "[corpus.splits], or set evaluation.split to a split other than train."
            )
        summary = stage.plan.summary
        left_out = [f"{summary[reason]:,} {reason}" for reason in ("duplicates", "empty", "refused") if summary.get(reason)]
        self.progress.say(
            f"corpus {product.name}: {summary['documents']:,} documents, {size(summary['text_bytes'])} of text, "
            f"{len(summary['parts'])} parts" + (f" (left out: {', '.join(left_out)})" if left_out else "")
        )
        if summary.get("refused"):
            self.progress.say(f"refused: {summary['why_refused'][0]} (more in {stage.dataset.folder / 'plan.json'})")
        self.progress.say(f"corpus {product.name}: read from {stage.data_files.where} ({stage.data_files.size})")
        if unread := stage.data_files.left_out:
            shown = ", ".join(unread[:_SHOWN]) + (f" and {len(unread) - _SHOWN} more" if len(unread) > _SHOWN else "")
            self.progress.say(f"corpus {product.name}: not read: {shown}")
        self.make_parts(product, parts=stage.parts())

    def make_parts(self, product: PartsProduct, *, parts: list[int]) -> None:
        """Make the missing ones of these parts of a product. The texts of a corpus are available meanwhile.

        Raises:
            DamagedPart: the payload of a committed part is missing.
            FuselineError: parts failed; see `Executor.run`.
        """
        stage, title = self.site.stage(product), product.title
        if not isinstance(stage, CorpusStage):
            self._make_missing(title, stage, parts=parts)
            return
        if stage.dataset.missing(parts):
            stage.prepare()
        self._make_missing(title, stage, parts=parts)
        stage.finish()

    # ---- training and merging ----------------------------------------------------------------------------------------------------------

    def prepare_training(self, *, names: Sequence[str] | None = None) -> None:
        """Write the job files, for ranks that the user starts."""
        self._check_domains("train")
        chosen = [product for product in self.graph.of_kind(Trained) if names is None or product.name in names]
        self._require_names(chosen)
        for product in chosen:
            self.site.require_inputs(product)
            self._make_inputs(product)
            job = product.job(self.site)
            job.save()
            self.progress.say(
                f"{describe(job)}\n{product.title} is prepared. On one machine, start them with:\n"
                f"  torchrun --nproc-per-node {job.config.world_size} -m fuseline.train {shlex.quote(str(job.run_folder))}"
            )

    def _train(self, product: Trained) -> None:
        job = product.job(self.site)
        if product.is_done(self.workspace):
            launch(job, on_metrics=lambda record: None)  # checks that the training is the same
            self.progress.say(f"{product.title}: nothing to do")
            return
        train(job, workspace=self.workspace, progress=self.progress, fold=self.fold)
        self.fold()
        self.progress.say(f"{product.title}: model written to {job.export_folder}")

    def _merge(self, product: Merged) -> None:
        product.require_same(self.site)
        if product.is_done(self.workspace):
            self.progress.say(f"{product.title}: nothing to do")
            return
        merge(product, site=self.site, workspace=self.workspace, progress=self.progress)
        self.fold()
        self.progress.say(f"{product.title}: model written to {product.export_folder(self.workspace)}")

    def _say_what_is_not_merged(self) -> None:
        for recipe in self.graph.recipes.values():
            if recipe.merge is not None and recipe.merged_name is None:
                self.progress.say(f"merge {recipe.merge.name}: nothing to merge, because {recipe.merge.method} needs at least two models")

    # ---- repair ------------------------------------------------------------------------------------------------------------------------

    def repairable(self) -> Iterator[PartsProduct]:
        """The products that have parts, in order. Those that need the recipe's own models are included once all these models are made."""
        all_made = all(model.is_done(self.workspace) for model in self.graph.made_models)
        for product in self.graph:
            if isinstance(product, PartsProduct) and (all_made or not self.graph.needs_made_model(product)):
                yield product

    # ---- common ------------------------------------------------------------------------------------------------------------------------

    def _make_missing(self, title: str, stage: Stage, *, parts: list[int]) -> None:
        """Make the missing parts, and add them to the catalog."""
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
                self.fold()  # adds the parts that did not fail
                raise
        self.fold()
        if quarantined:
            self.progress.say(
                f"{title}: {quarantined} document{'s' * (quarantined != 1)} left out; why: fuseline sql "
                f"\"SELECT * FROM quarantine WHERE name = '{stage.dataset.name}'\""
            )
