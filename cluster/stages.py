"""The stages of a recipe: which datasets it needs, of which identities, made how. Nothing is run here."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..align.alignments import AlignmentsStage, alignment_identity
from ..align.config import FusionConfig
from ..align.fusion import FusionStage, fusion_identity
from ..align.maps import VocabularyMapStage, end_of_turn, vocabulary_map_identity
from ..align.matches import TokenMatchesStage, matches_identity
from ..align.sources import FusionSource
from ..ingest.agreement import disagreements
from ..ingest.chat.readings import ChatReading, CorpusTemplate
from ..ingest.corpus import CorpusStage, corpus_identity, corpus_source
from ..ingest.distributions import DistributionsStage, arithmetic_of_parts, distributions_identity
from ..ingest.earlier_corpus import kept_identity, require_read_right
from ..ingest.models import ModelConfig, ModelFolder, find_model, require_different_folders
from ..ingest.sources import Source
from ..recipe import Fusion, Recipe
from ..store.corpus_plan import require_domains
from ..store.dataset import Dataset, as_ranges
from ..store.errors import FingerprintMismatch, UsageError
from ..store.machine import arithmetic_for, processor_arithmetic_for
from ..store.tokenizer import Tokenizer, changed_reading
from ..store.workspace import Workspace
from .conflicts import Conflict, fusion_conflicts, require_free
from .work import Stage


class Stages:
    """The stages of a recipe in a workspace. To ask for one opens its dataset, or begins it, and those that it is made from."""

    def __init__(self, recipe: Recipe, *, base: Path, workspace: Workspace, models_dir: Path, say: Callable[[str], None]) -> None:
        """`base` is the recipe's folder, to which its paths are relative; `models_dir` holds models by their hub id.

        `say` is called with each remark on a model folder when it is opened.
        """
        self.recipe, self.base, self.workspace, self.models_dir, self._say = recipe, base, workspace, models_dir, say

    # ---- corpus ------------------------------------------------------------------------------------------------------------------------

    @cached_property
    def models(self) -> dict[str, ModelFolder]:
        """The target's start and the sources, by name, found and checked.

        Raises:
            DataError: one is not there, or cannot be used.
            UsageError: the corpus's segments would not fit one's context.
        """
        found = {config.name: find_model(config, models_dir=self.models_dir, base=self.base) for config in self.recipe.models}
        context_length = self.recipe.corpus.context_length
        for name, model in found.items():
            if model.context_length is not None and context_length > model.context_length:
                raise UsageError(
                    f"corpus.context_length ({context_length}) must be at most the context of {name} ({model.context_length}, by its "
                    "config.json)."
                )
        require_different_folders(found.values())
        for name, model in found.items():
            for remark in (*model.remarks, *disagreements(model, cache=self.workspace.root / "models")):
                self._say(f"Beware: model {name}: {remark}.")
        return {name: replace(model, kept_tokenizer=self._kept_tokenizer(model)) for name, model in found.items()}

    def _kept_tokenizer(self, model: ModelFolder) -> Tokenizer | None:
        """The tokenizer that the model's stored datasets were made with, if it reads text as the model's folder says."""
        names = [model.config.name, f"{model.config.name}--{self.recipe.evaluation.split}"]
        places = [("distributions", names[0], "tokenizer"), ("evaluations", names[1], "tokenizer")]
        if model.config.name == self.recipe.target.name:
            places.append(("corpus", self.recipe.corpus.name, "chat_tokenizer"))
        for kind, name, key in places:
            folder = self.workspace.folder(kind, name)
            if (folder / "dataset.json").exists():
                digest = str(Dataset.open(folder).identity.get(key, ""))
                found = None if digest == model.tokenizer.digest else model.tokenizer.with_fewer_roles(digest)
                if found is not None:
                    return found
        return None

    @cached_property
    def corpus(self) -> CorpusStage:
        """The stage that makes the corpus."""
        config = self.recipe.corpus
        for model in self.models.values():
            self._tokenizer_folder(model)
        chat = self._corpus_template
        tokenizers = [model.tokenizer for model in self._segmented_for]
        identity = asked = corpus_identity(config, source=self.source, tokenizers=tokenizers, chat=chat)
        folder = self.workspace.folder("corpus", config.name)
        if (folder / "dataset.json").exists():
            stored = Dataset.open(folder)
            # Segments are settled when the corpus is first made: a source that is added later does not undo all that was stored.
            asked = asked | {"segmented_for": stored.identity["segmented_for"]}
            identity = kept_identity(stored, asked=asked)
        dataset = self.workspace.dataset("corpus", config.name, identity=identity, description={"source": self.source.where})
        tokenizer_folders = [self.workspace.folder("tokenizers", digest) for digest in identity["segmented_for"]]
        stage = CorpusStage(dataset, config=config, source=self.source, tokenizer_folders=tokenizer_folders, chat=chat)
        require_read_right(stage, asked=asked)
        return stage

    @cached_property
    def source(self) -> Source:
        """Where the documents are."""
        return corpus_source(self.recipe.corpus, base=self.base)

    @property
    def _segmented_for(self) -> list[ModelFolder]:
        """The models whose context every segment must fit; those that write conversations down themselves are not among them."""
        return [model for model in self.models.values() if model.config.chat_template == "shared"]

    @cached_property
    def _corpus_template(self) -> CorpusTemplate | None:
        """The chat template that conversations are written in; None for plain text."""
        chat = self.recipe.corpus.chat
        return None if chat is None else CorpusTemplate.of(chat, target=self.models[self.recipe.target.name], base=self.base)

    @property
    def chat_template(self) -> str | None:
        """The Jinja program that the recipe names; None where there is none, or it is the target's own."""
        chat, written = self.recipe.corpus.chat, self._corpus_template
        return written.template.source if chat is not None and chat.template is not None and written is not None else None

    def _chat_reading(self, model: ModelFolder) -> ChatReading | None:
        """How a model reads conversations: what the target's start becomes reads them as it does."""
        written = self._corpus_template
        if written is None:
            return None
        return self._source_readings.get(model.config.name) or ChatReading(template=written.template, rendering="shared")

    @cached_property
    def _source_readings(self) -> dict[str, ChatReading]:
        """How each source reads conversations, by name: its own template is tried once."""
        chat, written = self.recipe.corpus.chat, self._corpus_template
        if chat is None or written is None:
            return {}
        return {
            source.name: ChatReading.of_source(self.models[source.name], written=written, date=chat.date) for source in self.recipe.sources
        }

    def check_readings(self) -> None:
        """Refuse models that cannot read the conversations as the recipe says before anything is made.

        Raises:
            FuselineError: a chat template is missing or does not run, or a control token has no embedding.
        """
        for model in self.models.values():
            reading = self._chat_reading(model)
            if reading is not None:
                reading.reader(model.tokenizer).require_known(model.vocab_size)

    def parts_of(self, split: str) -> list[int]:
        """The corpus's parts of one split.

        Raises:
            UsageError: the corpus is not there yet.
        """
        if not (self.corpus.dataset.folder / "plan.json").exists():
            raise UsageError("The corpus is not there yet. Make it first: fuseline ingest corpus RECIPE.")
        parts = self._planned_parts(split)
        self.require(self.corpus.dataset, parts=parts, command="ingest corpus")
        return parts

    def _planned_parts(self, split: str) -> list[int]:
        return [index for index, part in enumerate(self.corpus.plan.parts) if part["split"] == split]

    def _tokenizer_folder(self, model: ModelFolder) -> Path:
        folder = self.workspace.folder("tokenizers", model.tokenizer.digest)
        model.tokenizer.save(folder)
        return folder

    # ---- distributions -----------------------------------------------------------------------------------------------------------------

    @cached_property
    def distributions(self) -> dict[str, Dataset]:
        """The distributions of each model, by name."""
        return {name: self.forward(model).dataset for name, model in self.models.items()}

    def forward(self, model: ModelFolder, *, kind: str = "distributions") -> DistributionsStage:
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
        chat = self._chat_reading(model)
        identity = distributions_identity(model, corpus=self.corpus.dataset, split=split, dtype=dtype, top_k=top_k, codec=codec, chat=chat)
        begun = Dataset(self.workspace.folder(kind, name), identity, description)
        if not (begun.folder / "dataset.json").exists():
            description["arithmetic"] = self._arithmetic(begun, dtype=dtype)
        return DistributionsStage(
            self._of_model(model, kind=kind, name=name, identity=identity, description=description),
            corpus=self.corpus.dataset,
            model_folder=model.folder,
            tokenizer_folder=self._tokenizer_folder(model),
            dtype=dtype,
            trust_remote_code=model.config.trust_remote_code,
            top_k=top_k,
            codec=codec,
            chat=chat,
            # A model's own template may write more than the one that segments were cut for.
            context_length=model.context_length if chat is not None and chat.rendering == "own" else None,
        )

    def _of_model(self, model: ModelFolder, *, kind: str, name: str, identity: dict[str, Any], description: dict[str, Any]) -> Dataset:
        """The dataset; if it is refused because the model's tokenizer was read differently, the message says how."""
        try:
            return self.workspace.dataset(kind, name, identity=identity, description=description)
        except FingerprintMismatch as error:
            stored = str(Dataset.open(self.workspace.folder(kind, name)).identity.get("tokenizer", ""))
            reason = changed_reading(self.workspace.folder("tokenizers", stored), now=model.tokenizer)
            if reason is None:
                raise
            raise FingerprintMismatch(f"{error}\n{reason}") from error

    def _arithmetic(self, dataset: Dataset, *, dtype: str) -> str:
        """The number format of the forward passes of a dataset that is begun here: that of its parts, if it lost nothing but its record.

        Workers on a cluster that are given GPUs compute in `dtype`; others are taken to have no GPU, and processors like this machine's.
        """
        executor = self.recipe.executor
        if (stored := arithmetic_of_parts(dataset, dtype=dtype)) is not None:
            return stored
        if executor.kind == "local":
            return arithmetic_for(dtype)
        return dtype if executor.resources.of(dataset.kind).gpus > 0 else processor_arithmetic_for(dtype)

    # ---- alignment and fusion ----------------------------------------------------------------------------------------------------------

    @property
    def _of_corpus(self) -> dict[str, Any]:
        return {"corpus": self.recipe.corpus.name}

    def _pair(self, source: ModelConfig) -> str:
        return f"{source.name}--{self.recipe.target.name}"

    def alignment_stages(self, source: ModelConfig) -> Iterator[tuple[str, Stage]]:
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
        ends = end_of_turn(self.distributions[source.name], target=self.distributions[self.recipe.target.name])
        identity = vocabulary_map_identity(
            source_tokenizer.digest, target=target_tokenizer.digest, rule=rule, matches=matches, end_of_turn=ends
        )
        dataset = self.workspace.dataset("vocab_maps", alignment.map_name(self._pair(source)), identity=identity)
        parts = self._planned_parts("train") if matches else []
        return VocabularyMapStage(
            dataset, source=source_tokenizer, target=target_tokenizer, rule=rule, matches=matches, parts=parts, end_of_turn=ends
        )

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
    def _fusion_sources(self) -> dict[str, FusionSource]:
        """By name of the model; the target's start is one."""
        target = self.recipe.target.name
        return {target: FusionSource(name=target, distributions=self.distributions[target])} | {
            source.name: FusionSource(
                name=source.name,
                distributions=self.distributions[source.name],
                alignment=self._alignment_stage(source).dataset,
                vocabulary_map=self._vocabulary_stage(source).dataset,
            )
            for source in self.recipe.sources
        }

    def _sources_of(self, fusion: Fusion) -> list[FusionSource]:
        return [self._fusion_sources[model.name] for model in (self.recipe.target, *fusion.sources)]

    @property
    def _fusion_config(self) -> FusionConfig:
        return self.recipe.fusion.model_copy(update={"pack_length": self.recipe.pack_length})

    def fusion_identity(self, fusion: Fusion) -> dict[str, Any]:
        """What determines the targets of a fusion."""
        recipe, codec = self.recipe, self.recipe.distributions.codec
        return fusion_identity(
            self._sources_of(fusion), alignment=recipe.alignment, fusion=self._fusion_config, top_k=recipe.top_k, codec=codec
        )

    def fusion_conflicts(self) -> list[Conflict]:
        """Targets of the recipe's names that are of another identity."""
        found = []
        for fusion in self.recipe.fusions:
            found += fusion_conflicts(
                self.workspace, name=fusion.name, identity=self.fusion_identity(fusion), recipe_name=self.recipe.fusion.name
            )
        return found

    @cached_property
    def fusions(self) -> list[FusionStage]:
        """The fusions, in the recipe's order.

        Raises:
            FingerprintMismatch: the workspace has other targets under the name of one.
        """
        recipe = self.recipe
        require_free(self.fusion_conflicts(), workspace=self.workspace)
        stages = []
        for fusion in recipe.fusions:
            chosen = recipe.fusion.model_copy(update={"name": fusion.name})
            described = self._of_corpus | {"alignment": recipe.alignment.model_dump(), "fusion": chosen.model_dump()}
            stages.append(
                FusionStage(
                    self.workspace.dataset("targets", fusion.name, identity=self.fusion_identity(fusion), description=described),
                    sources=self._sources_of(fusion),
                    alignment=recipe.alignment,
                    fusion=self._fusion_config,
                    top_k=recipe.top_k,
                    codec=recipe.distributions.codec,
                    corpus=self.corpus.dataset,
                )
            )
        return stages

    # ---- common ------------------------------------------------------------------------------------------------------------------------

    def before_training(self) -> Iterator[tuple[str, Stage]]:
        """The stages that make parts and need no trained model, in order, with their titles; all of their datasets are opened."""
        yield "corpus", self.corpus
        for model in self.models.values():
            yield f"distributions {model.config.name}", self.forward(model)
        for source in self.recipe.sources:
            yield from self.alignment_stages(source)
        for fusion in self.fusions:
            yield f"targets {fusion.dataset.name}", fusion
        for model in self.models.values():
            yield f"evaluation {model.config.name}", self.forward(model, kind="evaluations")

    def require_domains(self, section: str, weights: Iterable[str]) -> None:
        require_domains(weights, field=f"{section}.domain_weights", known=self.corpus.plan.documents["domain"].unique())

    def require(self, dataset: Dataset, *, parts: list[int], command: str) -> None:
        missing = dataset.missing(parts)
        if missing:
            raise UsageError(
                f"{dataset.kind}/{dataset.name} lacks {len(missing)} of {len(parts)} parts ({as_ranges(missing)}). "
                f"First: fuseline {command} RECIPE."
            )
