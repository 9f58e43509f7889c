"""Predictions of models for the corpus: distributions on the train split, likelihoods of the held-out split."""

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ...ingest.distributions import DistributionsStage, distributions_identity, forward_choices
from ...ingest.model_config import ModelConfig
from ...store.dataset import Dataset
from ...store.fingerprint import Identity
from .corpus import Corpus
from .cost import Cost, Sizes, record_bytes
from .product import AtLeast, Drawing, InputMissing, OpenSite, PartsProduct, Product, Site, opened

_EVALUATION_BYTES = 6  # per token


@dataclass(frozen=True, eq=False, kw_only=True)
class Forward(PartsProduct):
    """Predictions of one model for one split of the corpus."""

    of_corpus: Corpus
    config: ModelConfig | None  # of a model that the recipe names; None for one that it makes

    @property
    @abstractmethod
    def dtype(self) -> str:
        """Number format of the weights."""

    @property
    @abstractmethod
    def model_name(self) -> str:
        """The model's name in SQL and reports."""

    @property
    def top_k(self) -> int:
        """Number of stored entries of each distribution."""
        return self.recipe.distributions.top_k

    @property
    def codec(self) -> Literal["f16", "q8"]:
        """The encoding of the stored entries."""
        return self.recipe.distributions.codec

    @property
    def inputs(self) -> tuple[Product, ...]:
        return (self.of_corpus,)

    @property
    def rendering(self) -> str | None:
        """How the model reads conversations; None for plain text."""
        if self.recipe.corpus.chat is None:
            return None
        if self.config is None or self.config.name == self.recipe.target.name:
            return "shared"
        return "own" if self.config.chat_template == "own" else "foreign"

    @property
    def choices(self) -> Mapping[str, Any]:
        said: dict[str, Any] = {"split": self.split, "dtype": self.dtype, "top_k": self.top_k, "codec": self.codec}
        if self.config is not None:
            settings = {"name", "model", "revision", "prepends_bos", "chat_template", "trust_remote_code"}
            said |= {"of": self.config.model_dump(include=settings), "rendering": self.rendering}
        return said

    def identity(self, site: Site) -> Identity:
        place = opened(site)
        if place is None:
            chosen = forward_choices(split=str(self.split), dtype=self.dtype, top_k=self.top_k, codec=self.codec)
            with contextlib.suppress(InputMissing):
                chosen |= {"corpus": site.dataset(self.of_corpus).fingerprint}
            return AtLeast(chosen if self.rendering is None else chosen | {"chat": AtLeast(rendering=self.rendering)})
        return distributions_identity(
            place.model(self),
            corpus=site.dataset(self.of_corpus),
            split=str(self.split),
            dtype=self.dtype,
            top_k=self.top_k,
            codec=self.codec,
            chat=place.reading(self),
        )

    def description(self, site: OpenSite) -> dict[str, Any]:
        model = site.model(self)
        described = super().description(site) | {
            "model": self.model_name,
            "split": self.split,
            "source": model.config.model,
            "model_type": model.hf_config.get("model_type"),
            "vocab_size": model.vocab_size,
            "parameters": model.n_parameters,
        }
        folder = self.folder(site.layout)
        if not (folder / "dataset.json").exists():
            described["arithmetic"] = site.arithmetic(Dataset(folder, site.identity(self), described), dtype=self.dtype)
        return described

    def stage(self, site: OpenSite) -> DistributionsStage:
        model, chat = site.model(self), site.reading(self)
        return DistributionsStage(
            site.dataset(self),
            corpus=site.dataset(self.of_corpus),
            model_folder=model.folder,
            tokenizer_folder=site.tokenizer_folder(model),
            dtype=self.dtype,
            trust_remote_code=model.config.trust_remote_code,
            top_k=self.top_k,
            codec=self.codec,
            chat=chat,
            # A model's own template may write more tokens than the template for which segments were cut.
            context_length=model.context_length if chat is not None and chat.rendering == "own" else None,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Distributions(Forward):
    """`distributions/<model>`."""

    kind: ClassVar[str] = "distributions"
    command: ClassVar[str] = "ingest distributions"
    noun: ClassVar[str] = "distributions"

    config: ModelConfig

    @classmethod
    def of(cls, drawing: Drawing) -> Iterator["Distributions"]:
        for model in drawing.recipe.models:
            yield cls(recipe=drawing.recipe, of_corpus=drawing.get(Corpus, ""), config=model)

    @property
    def role(self) -> str:
        return self.config.name

    @property
    def name(self) -> str:
        return self.model_name

    @property
    def model_name(self) -> str:
        return self.suffixed(self.config.name)

    @property
    def dtype(self) -> str:
        return self.config.dtype

    def cost(self, sizes: Sizes) -> Cost:
        model, tokens = sizes.model(self), sizes.tokens(self, "train")
        stored = tokens * record_bytes(model, k=self.top_k, codec=self.codec)
        return Cost(stored_bytes=stored, tokens=tokens, flops=2 * model.parameters * tokens, dtype=self.dtype)


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluation(Forward):
    """`evaluations/<model>--<split>`: the likelihood of held-out text, for a model that the recipe names or makes."""

    kind: ClassVar[str] = "evaluations"
    command: ClassVar[str] = "eval"
    noun: ClassVar[str] = "evaluation"
    is_last: ClassVar[bool] = True
    is_made_on_demand: ClassVar[bool] = True

    made: Product | None = None  # the model, if the recipe makes it

    @classmethod
    def of(cls, drawing: Drawing) -> Iterator["Evaluation"]:
        for model in drawing.recipe.models:
            yield cls(recipe=drawing.recipe, of_corpus=drawing.get(Corpus, ""), config=model)

    @property
    def role(self) -> str:
        return self.model_name

    @property
    def model_name(self) -> str:
        return self.suffixed(self.config.name if self.config is not None else self._made.name)

    @property
    def _made(self) -> Product:
        assert self.made is not None
        return self.made

    @property
    def name(self) -> str:
        return f"{self.model_name}--{self.split}"

    @property
    def title(self) -> str:
        return f"{self.noun} {self.model_name}"

    @property
    def inputs(self) -> tuple[Product, ...]:
        return (self.of_corpus, *([] if self.made is None else [self.made]))

    @property
    def split(self) -> str:
        return self.recipe.evaluation.split

    @property
    def dtype(self) -> str:
        return self.recipe.evaluation.dtype

    @property
    def top_k(self) -> int:
        return 0

    @property
    def codec(self) -> Literal["f16", "q8"]:
        return "f16"  # no distribution is stored

    def cost(self, sizes: Sizes) -> Cost:
        tokens = sizes.tokens(self, self.split)
        return Cost(
            stored_bytes=_EVALUATION_BYTES * tokens, tokens=tokens, flops=2 * sizes.model(self).parameters * tokens, dtype=self.dtype
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class MadeEvaluation(Evaluation):
    """The evaluations of the models that the recipe makes."""

    @classmethod
    def of(cls, drawing: Drawing) -> Iterator["MadeEvaluation"]:
        for made in drawing.models():
            yield cls(recipe=drawing.recipe, of_corpus=drawing.get(Corpus, ""), config=None, made=made)
