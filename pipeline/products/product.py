"""What all products of a recipe have in common: a place in the graph, and an identity that follows from those of their inputs.

To add a kind of product: a subclass with its stage, and its name in `graph.KINDS`. What runs, plans, reports and repairs walks the graph.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from ...ingest.corpus import CorpusStage
from ...ingest.models import ModelFolder
from ...store.dataset import Dataset
from ...store.errors import FuselineError, UsageError
from ...store.fingerprint import Identity, differences
from ...store.layout import Layout
from ..executors.work import Stage
from ..recipe import Recipe
from .cost import Cost, Sizes

if TYPE_CHECKING:
    from ...ingest.chat.readings import ChatReading, CorpusTemplate
    from ...ingest.data_files import DataFiles


class AtLeast(dict[str, Any]):
    """An identity of which only some keys are known, because the models were not opened; it is compared by these keys."""


class InputMissing(FuselineError):
    """An input of a product is not there, so that the identity of the product is not known yet."""

    def __init__(self, product: "Product") -> None:
        super().__init__(f"{product.kind}/{product.name} is not there yet.")
        self.product = product


class Site(Protocol):
    """A workspace as products see it: one that a run has opened, or one that is only looked at."""

    layout: Layout

    def dataset(self, product: "PartsProduct") -> Dataset:
        """The dataset of a product.

        Raises:
            InputMissing: it is not there, and this site begins none.
        """

    def identity(self, product: "Product") -> Identity:
        """`product.identity`, computed once."""

    def models(self, recipe: Recipe) -> Mapping[str, ModelFolder] | None:
        """The target's start and the sources of a recipe, by name; None where models are not opened."""

    def model(self, product: "Product") -> ModelFolder | None:
        """The model that a product reads the corpus with; None where models are not opened."""


class OpenSite(Site, Protocol):
    """A workspace that a run has opened: everything is found, and what is missing can be made."""

    base: Path  # of the recipe, to which its paths are relative

    def models(self, recipe: Recipe) -> Mapping[str, ModelFolder]:
        """The target's start and the sources of a recipe, by name."""

    def model(self, product: "Product") -> ModelFolder:
        """The model that a product reads the corpus with."""

    def recipes(self, product: "Product") -> list[Recipe]:
        """The recipes, of variants too, that ask for a product."""

    def data_files(self, product: "Product") -> "DataFiles":
        """Where the documents of a corpus are."""

    def template(self, product: "Product") -> "CorpusTemplate | None":
        """The chat template that the conversations of a corpus are written in; None of plain text."""

    def reading(self, product: "Product") -> "ChatReading | None":
        """How the model of a forward pass reads conversations; None of plain text."""

    def stage(self, product: "PartsProduct") -> Stage:
        """`product.stage`, made once."""

    def corpus_stage(self, product: "Product") -> CorpusStage:
        """The stage of the corpus that a product is made from, or that it is."""

    def tokenizer_folder(self, model: ModelFolder) -> Path:
        """Where the tokenizer of a model is stored."""

    def parts(self, product: "PartsProduct") -> list[int]:
        """The parts that a product has; its corpus must be there."""

    def arithmetic(self, dataset: Dataset, *, dtype: str) -> str:
        """The number format in which the forward passes of a dataset that is begun here are computed."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Product(ABC):
    """One thing that a recipe makes."""

    recipe: Recipe  # the first that asks for it
    suffix: str = ""  # of its name, where a variant needs another product of the same name

    kind: ClassVar[str]
    command: ClassVar[str]  # that makes it: `fuseline <command> RECIPE`
    noun: ClassVar[str]  # in titles
    is_last: ClassVar[bool] = False  # made after everything that does not need it
    is_made_on_demand: ClassVar[bool] = False  # together with the product that needs it, whatever the command

    @classmethod
    @abstractmethod
    def of(cls, draft: "Drawing") -> Iterator["Product"]:
        """Those that a recipe asks for."""

    @property
    @abstractmethod
    def role(self) -> str:
        """What the others of the same recipe find it by: the name of a model or of a fusion, say."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Its name in its kind."""

    @property
    @abstractmethod
    def inputs(self) -> tuple["Product", ...]:
        """What it is made from."""

    @property
    @abstractmethod
    def choices(self) -> Mapping[str, Any]:
        """What of the recipe determines it, beside what is in its inputs. Two products of one kind, choices and inputs are one."""

    @abstractmethod
    def identity(self, site: Site) -> Identity:
        """What determines its content, from the identities of its inputs; `AtLeast` where the models are not opened.

        Raises:
            InputMissing: that of an input is not known yet.
        """

    @abstractmethod
    def folders(self, layout: Layout) -> list[Path]:
        """Where it is, or would be."""

    @abstractmethod
    def is_done(self, layout: Layout) -> bool:
        """Whether all of it is there, by the files alone; whether it is this one, its identity says."""

    @abstractmethod
    def cost(self, sizes: Sizes) -> Cost:
        """What all of it takes."""

    @property
    def name_key(self) -> tuple[str, str] | None:
        """Section and key of the recipe that name it; None of what is named after its inputs."""
        return None

    @property
    def recipe_name(self) -> str:
        """The name that the recipe has under `name_key`."""
        if self.suffix:
            return self.suffix
        assert self.name_key is not None
        section, key = self.name_key
        return str(getattr(getattr(self.recipe, section), key))

    @property
    def title(self) -> str:
        """What it is called in messages."""
        return f"{self.noun} {self.name}"

    @property
    def determining(self) -> tuple["Product", ...]:
        """The inputs that determine its content; the others are only read."""
        return self.inputs

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Equal for products that are one."""
        chosen = json.dumps(self.choices, sort_keys=True, default=str)
        return (self.kind, chosen, *(product.key for product in self.determining))

    def suffixed(self, name: str) -> str:
        """A name, with the variant's where another product has it already."""
        return f"{name}-{self.suffix}" if self.suffix else name

    def changes(self, stored: Identity, asked: Identity, *, layout: Layout) -> list[str]:
        """A line for each difference between what is stored under its name and what is asked for."""
        return differences(restricted(stored, to=asked), asked)

    def without_input(self, missing: InputMissing) -> list[str]:
        """What differs where something is stored under its name, and an input of what is asked for is not there."""
        return []

    def require_done(self, site: OpenSite) -> None:
        """Raise UsageError unless it is there, with the command that makes it."""
        if not self.is_done(site.layout):
            raise UsageError(f"{self.title} is not there yet. Make it first: fuseline {self.command} RECIPE.")


@dataclass(frozen=True, eq=False, kw_only=True)
class PartsProduct(Product):
    """A product that a stage makes part by part: a dataset."""

    @abstractmethod
    def stage(self, site: OpenSite) -> Stage:
        """What makes its parts."""

    @property
    def split(self) -> str | None:
        """The split of the corpus whose parts it has; None of one that has a single part."""
        return "train"

    @property
    def corpus(self) -> "PartsProduct | None":
        """The corpus whose parts it has; None of a corpus."""
        return next((product.corpus or product for product in self.inputs if isinstance(product, PartsProduct)), None)

    def description(self, site: OpenSite) -> dict[str, Any]:
        """Facts that do not determine the content: see `Dataset.description`."""
        return {} if self.corpus is None or self.split is None else {"corpus": self.corpus.name}

    def folder(self, layout: Layout) -> Path:
        """Of its dataset."""
        return layout.folder(self.kind, self.name)

    def folders(self, layout: Layout) -> list[Path]:
        return [self.folder(layout)]

    def stored(self, layout: Layout) -> Dataset | None:
        """What is stored under its name, whatever its identity."""
        folder = self.folder(layout)
        return Dataset.open(folder) if (folder / "dataset.json").exists() else None

    def planned_parts(self, plan: Mapping[str, Any] | None) -> list[int] | None:
        """Its parts, by the plan of its corpus; None where that is not planned yet."""
        if self.split is None:
            return [0]
        return None if plan is None else [index for index, part in enumerate(plan["parts"]) if part["split"] == self.split]

    def is_done(self, layout: Layout) -> bool:
        from ...store.corpus_plan import read_plan

        stored = self.stored(layout)
        corpus = self.corpus or self
        parts = self.planned_parts(read_plan(layout.folder("corpus", corpus.name)))
        return stored is not None and parts is not None and not stored.missing(parts)


Made = TypeVar("Made", bound=Product)


class Drawing(Protocol):
    """A graph as it is drawn, of one recipe: the kinds before this one are in it."""

    recipe: Recipe

    def get(self, kind: type[Made], role: str) -> Made:
        """A product by its role."""

    def models(self) -> Sequence[Product]:
        """The models that the recipe makes."""


def restricted(stored: Identity, *, to: Identity) -> Identity:
    """The keys of a stored identity that are compared with what is asked for."""
    if not isinstance(to, AtLeast):
        return stored
    found = {key: stored.get(key) for key in to}
    return {key: restricted(value, to=to[key]) if isinstance(value, Mapping) else value for key, value in found.items()}
