"""A workspace that is open for a run. It finds and checks models, opens or starts datasets, and creates stages."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from ..ingest.agreement import disagreements
from ..ingest.chat.readings import ChatReading, CorpusTemplate
from ..ingest.corpus import CorpusStage, data_files_of
from ..ingest.data_files import DataFiles
from ..ingest.distributions import arithmetic_of_parts
from ..ingest.model_config import ModelConfig
from ..ingest.models import ModelFolder, find_model, require_different_folders
from ..store.corpus_plan import require_domains
from ..store.dataset import Dataset, as_ranges
from ..store.errors import FingerprintMismatch, UsageError
from ..store.fingerprint import Identity
from ..store.layout import Layout
from ..store.machine import arithmetic_for, processor_arithmetic_for
from ..store.tokenizer import Tokenizer, changed_reading
from ..store.workspace import Workspace
from .executors.config import ExecutorConfig
from .executors.work import Stage
from .graph import Graph
from .products.corpus import Corpus
from .products.forward import Evaluation, Forward
from .products.product import PartsProduct, Product
from .products.trained import ModelProduct
from .recipe import Recipe


class Opened:
    """The graph of a recipe in a workspace. Implements `OpenSite`. Access to a dataset opens or starts it and its inputs."""

    def __init__(
        self,
        graph: Graph,
        *,
        base: Path,
        workspace: Workspace,
        models_dir: Path,
        executor: ExecutorConfig,
        say: Callable[[str], None],
    ) -> None:
        """Open the workspace for a recipe.

        Args:
            graph: the graph of the recipe.
            base: the recipe's folder, to which its paths are relative.
            workspace: where everything is made.
            models_dir: folder with models, by hub id.
            executor: makes the parts; their arithmetic depends on it.
            say: called with each remark on a model folder when the folder is opened.
        """
        self.graph, self.base, self.models_dir = graph, base, models_dir
        self.layout: Layout = workspace
        self.is_open = True
        self._workspace, self._executor, self._say = workspace, executor, say
        self._models: dict[ModelConfig, ModelFolder] = {}
        self._exported: dict[Product, ModelFolder] = {}
        self._of_recipe: dict[int, dict[str, ModelFolder]] = {}
        self._identities: dict[Product, Identity] = {}
        self._datasets: dict[Product, Dataset] = {}
        self._stages: dict[Product, Stage] = {}
        self._data_files: dict[Product, DataFiles] = {}
        self._templates: dict[Product, CorpusTemplate | None] = {}
        self._readings: dict[tuple[Product, ModelConfig], ChatReading] = {}

    # ---- models ------------------------------------------------------------------------------------------------------------------------

    def models(self, recipe: Recipe) -> Mapping[str, ModelFolder]:
        """Find and check the target's start and the sources of a recipe; by name.

        Raises:
            DataError: a model is missing or cannot be used.
            UsageError: the corpus's segments are longer than a model's context.
        """
        if id(recipe) not in self._of_recipe:
            self._of_recipe[id(recipe)] = self._opened_models(recipe)
        return self._of_recipe[id(recipe)]

    def _opened_models(self, recipe: Recipe) -> dict[str, ModelFolder]:
        unknown = [config for config in recipe.models if config not in self._models]
        for config in unknown:
            self._models[config] = find_model(config, models_dir=self.models_dir, base=self.base)
        found = {config.name: self._models[config] for config in recipe.models}
        context_length = recipe.corpus.context_length
        for name, model in found.items():
            if model.context_length is not None and context_length > model.context_length:
                raise UsageError(
                    f"corpus.context_length ({context_length}) must be at most the context of {name} ({model.context_length}, by its "
                    "config.json)."
                )
        require_different_folders(found.values())
        for config in unknown:
            model = self._models[config]
            for remark in (*model.remarks, *disagreements(model, cache=self.layout.root / "models")):
                self._say(f"Warning: model {config.name}: {remark}.")
            self._models[config] = replace(model, kept_tokenizer=self._kept_tokenizer(model))
        return {config.name: self._models[config] for config in recipe.models}

    def _kept_tokenizer(self, model: ModelFolder) -> Tokenizer | None:
        """The tokenizer of the model's stored datasets, if it gives the same tokens as the model's folder."""
        places: list[tuple[PartsProduct, str]] = [
            (each, "tokenizer") for each in self.graph.of_kind(Forward) if each.config == model.config
        ]
        places += [(each, "chat_tokenizer") for each in self.graph.of_kind(Corpus) if each.recipe.target == model.config]
        for product, key in places:
            stored = product.stored(self.layout)
            if stored is not None:
                digest = str(stored.identity.get(key, ""))
                found = None if digest == model.tokenizer.digest else model.tokenizer.with_fewer_roles(digest)
                if found is not None:
                    return found
        return None

    def model(self, product: Product) -> ModelFolder:
        """The model with which a product reads the corpus. A model that the recipe makes must have the right identity."""
        assert isinstance(product, Forward)
        if product.config is not None:
            recipes = self.graph.users(product)
            recipe = next((each for each in self.graph.recipes.values() if product.config in each.models), recipes[0])
            return self.models(recipe)[product.config.name]
        assert isinstance(product, Evaluation)
        made = product.made
        assert isinstance(made, ModelProduct)
        made.require_same(self)
        return self.exported(made)

    def exported(self, product: Product) -> ModelFolder:
        """The stored model of a product that makes one, checked once: its digest is a hash of all its weights."""
        assert isinstance(product, ModelProduct)
        if product not in self._exported:
            self._exported[product] = product.exported(self.layout)
        return self._exported[product]

    def tokenizer_folder(self, model: ModelFolder) -> Path:
        """The folder of a model's stored tokenizer; it is written if it is missing."""
        folder = self.layout.folder("tokenizers", model.tokenizer.digest)
        model.tokenizer.save(folder)
        return folder

    # ---- corpora -----------------------------------------------------------------------------------------------------------------------

    def data_files(self, product: Product) -> DataFiles:
        """The files with the documents of a corpus."""
        if product not in self._data_files:
            self._data_files[product] = data_files_of(product.recipe.corpus, base=self.base)
        return self._data_files[product]

    def template(self, product: Product) -> CorpusTemplate | None:
        """The chat template of the conversations of a corpus; None for plain text."""
        if product not in self._templates:
            recipe = self.graph.users(product)[0]
            chat, target = recipe.corpus.chat, recipe.target.name
            self._templates[product] = None if chat is None else CorpusTemplate.of(chat, target=self.models(recipe)[target], base=self.base)
        return self._templates[product]

    def reading(self, product: Product) -> ChatReading | None:
        """How the model of a forward pass reads conversations. Models trained from the target's start read them as it does."""
        assert isinstance(product, Forward)
        chat, written = product.recipe.corpus.chat, self.template(product.of_corpus)
        if chat is None or written is None:
            return None
        if product.rendering == "shared":
            return ChatReading(template=written.template, rendering="shared")
        assert product.config is not None
        key = (product.of_corpus, product.config)
        if key not in self._readings:  # a model's own template is checked once
            self._readings[key] = ChatReading.of_source(self.model(product), written=written, date=chat.date)
        return self._readings[key]

    def check_readings(self) -> None:
        """Check before any computation that all models can read the conversations as the recipe says.

        Raises:
            FuselineError: a chat template is missing or does not run, or a control token has no embedding.
        """
        for recipe in self.graph.recipes.values():
            self.models(recipe)
        for product in self.graph.of_kind(Forward):
            reading = None if product.config is None else self.reading(product)
            if reading is not None:
                model = self.model(product)
                reading.reader(model.tokenizer).require_known(model.vocab_size)

    def corpus_stage(self, product: Product) -> CorpusStage:
        """The stage of a product's corpus, or of the product itself if it is a corpus."""
        assert isinstance(product, PartsProduct)
        stage = self.stage(product if isinstance(product, Corpus) else product.corpus)
        assert isinstance(stage, CorpusStage)
        return stage

    def parts(self, product: PartsProduct) -> list[int]:
        """The parts of a product.

        Raises:
            UsageError: the corpus is not there yet.
        """
        if isinstance(product, Corpus):
            return self.corpus_stage(product).parts()
        if product.split is None:
            return [0]
        stage = self.corpus_stage(product)
        if not (stage.dataset.folder / "plan.json").exists():
            raise UsageError("Make the corpus first: fuseline ingest corpus RECIPE. It is not there yet.")
        parts = product.planned_parts({"parts": stage.plan.parts})
        assert parts is not None
        require(stage.dataset, parts=parts, command=Corpus.command)
        return parts

    def require_domains(self, section: str, corpus: Corpus, weights: Iterable[str]) -> None:
        """Raise UsageError if a weight is for a domain that the corpus does not have."""
        known = self.corpus_stage(corpus).plan.documents["domain"].unique()
        require_domains(weights, field=f"{section}.domain_weights", known=known)

    # ---- products ----------------------------------------------------------------------------------------------------------------------

    def recipes(self, product: Product) -> list[Recipe]:
        """The recipes, including variants, that need a product."""
        return self.graph.users(product)

    def identity(self, product: Product) -> Identity:
        """The identity of a product: it determines the content."""
        if product not in self._identities:
            self._identities[product] = product.identity(self)
        return self._identities[product]

    def dataset(self, product: PartsProduct) -> Dataset:
        """Open or start the dataset of a product.

        Raises:
            FingerprintMismatch: the workspace has different data under its name.
        """
        if product not in self._datasets:
            identity, description = self.identity(product), product.description(self)
            try:
                dataset = self._workspace.dataset(product.kind, product.name, identity=identity, description=description)
            except FingerprintMismatch as error:
                raise self._explained(error, product) from error
            self._datasets[product] = dataset
        return self._datasets[product]

    def _explained(self, error: FingerprintMismatch, product: PartsProduct) -> FingerprintMismatch:
        """The error. If the model's tokenizer was read differently before, the message says how."""
        stored = product.stored(self.layout) if isinstance(product, Forward) else None
        if stored is None:
            return error
        folder = self.layout.folder("tokenizers", str(stored.identity.get("tokenizer", "")))
        reason = changed_reading(folder, now=self.model(product).tokenizer)
        return error if reason is None else FingerprintMismatch(f"{error}\n{reason}")

    def stage(self, product: PartsProduct | None) -> Stage:
        """The stage that makes the parts of a product."""
        assert product is not None
        if product not in self._stages:
            self._stages[product] = product.stage(self)
        return self._stages[product]

    def arithmetic(self, dataset: Dataset, *, dtype: str) -> str:
        """The number format of the forward passes of a new dataset. If only its record was lost, it is the format of its parts.

        Workers with GPUs on a cluster compute in `dtype`. Other workers are assumed to have no GPU, and this machine's kind of processor.
        """
        if (stored := arithmetic_of_parts(dataset, dtype=dtype)) is not None:
            return stored
        if self._executor.kind == "local":
            return arithmetic_for(dtype)
        return dtype if self._executor.resources.of(dataset.kind).gpus > 0 else processor_arithmetic_for(dtype)

    def require_inputs(self, product: Product, *, but: Collection[Product] = ()) -> None:
        """Raise UsageError if an input of a product is missing; the text names the command that makes it.

        An input that is made on demand may be missing, but its own inputs may not. The caller makes the products in `but` before.
        """
        for needed in product.inputs:
            if needed in but:
                continue
            if needed.is_made_on_demand:
                self.require_inputs(needed, but=but)
            elif isinstance(needed, PartsProduct):
                require(self.dataset(needed), parts=self.parts(needed), command=needed.command)
            else:
                needed.require_done(self)


def require(dataset: Dataset, *, parts: list[int], command: str) -> None:
    """Raise UsageError if a dataset lacks some of these parts; `command` makes them."""
    missing = dataset.missing(parts)
    if missing:
        raise UsageError(
            f"{dataset.kind}/{dataset.name} lacks {len(missing)} of {len(parts)} parts ({as_ranges(missing)}). "
            f"Make them first: fuseline {command} RECIPE."
        )
