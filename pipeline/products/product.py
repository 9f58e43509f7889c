"""The base of all products of a recipe: a place in the graph, and an identity that depends on the identities of the inputs.

To add a kind of product, write a subclass with its stage, and add it to `graph.KINDS`. Runs, plans, reports and repairs use the graph.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, cast

from ...ingest.corpus import CorpusStage
from ...ingest.models import ModelFolder
from ...store.corpus_plan import read_plan
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
    """An identity with only the keys that are known without opening the models. Only these keys are compared."""


class InputMissing(FuselineError):
    """An input of a product is missing, so the identity of the product is not known yet."""

    def __init__(self, product: "Product") -> None:
        super().__init__(f"{product.kind}/{product.name} is not there yet.")
        self.product = product


class Site(Protocol):
    """A workspace as products see it: open for a run, or only read."""

    layout: Layout
    is_open: bool  # an `OpenSite`

    def dataset(self, product: "PartsProduct") -> Dataset:
        """The dataset of a product.

        Raises:
            InputMissing: it does not exist, and this site does not create datasets.
        """

    def identity(self, product: "Product") -> Identity:
        """`product.identity`, computed once."""


class OpenSite(Site, Protocol):
    """A workspace that is open for a run: models are available, and missing products can be made."""

    def models(self, recipe: Recipe) -> Mapping[str, ModelFolder]:
        """The target's start and the sources of a recipe, by name."""

    def model(self, product: "Product") -> ModelFolder:
        """The model with which a product reads the corpus."""

    def exported(self, product: "Product") -> ModelFolder:
        """The stored model of a product that makes one, checked once."""

    def recipes(self, product: "Product") -> list[Recipe]:
        """The recipes, including variants, that need a product."""

    def data_files(self, product: "Product") -> "DataFiles":
        """The files with the documents of a corpus."""

    def template(self, product: "Product") -> "CorpusTemplate | None":
        """The chat template of the conversations of a corpus; None for plain text."""

    def reading(self, product: "Product") -> "ChatReading | None":
        """How the model of a forward pass reads conversations; None for plain text."""

    def stage(self, product: "PartsProduct") -> Stage:
        """`product.stage`, created once."""

    def corpus_stage(self, product: "Product") -> CorpusStage:
        """The stage of a product's corpus, or of the product itself if it is a corpus."""

    def tokenizer_folder(self, model: ModelFolder) -> Path:
        """The folder of a model's stored tokenizer."""

    def parts(self, product: "PartsProduct") -> list[int]:
        """The parts of a product; its corpus must be there."""

    def arithmetic(self, dataset: Dataset, *, dtype: str) -> str:
        """The number format of the forward passes of a new dataset."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Product(ABC):
    """A product of a recipe."""

    recipe: Recipe  # the first recipe that needs it
    suffix: str = ""  # of its name, if a variant needs a different product of the same name

    kind: ClassVar[str]
    command: ClassVar[str]  # the command that makes it: `fuseline <command> RECIPE`
    noun: ClassVar[str]  # in titles
    is_last: ClassVar[bool] = False  # made after all products that do not need it
    is_made_on_demand: ClassVar[bool] = False  # made together with the product that needs it, by any command

    @classmethod
    @abstractmethod
    def of(cls, drawing: "Drawing") -> Iterator["Product"]:
        """The products of this kind that a recipe needs."""

    @property
    @abstractmethod
    def role(self) -> str:
        """The key with which other products of the recipe find it, for example the name of a model or fusion."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Its name, unique in its kind."""

    @property
    @abstractmethod
    def inputs(self) -> tuple["Product", ...]:
        """The products from which it is made."""

    @property
    @abstractmethod
    def choices(self) -> Mapping[str, Any]:
        """The settings that determine it, in addition to its inputs. Products with equal kind, choices and inputs are one product."""

    @abstractmethod
    def identity(self, site: Site) -> Identity:
        """The data that determine its content, from the identities of its inputs; `AtLeast` if the models are not opened.

        Raises:
            InputMissing: the identity of an input is not known yet.
        """

    @abstractmethod
    def folders(self, layout: Layout) -> list[Path]:
        """Its folders, which may not exist yet."""

    @abstractmethod
    def is_done(self, layout: Layout) -> bool:
        """Whether its files are complete. The identity is not checked."""

    @abstractmethod
    def cost(self, sizes: Sizes) -> Cost:
        """The cost of the whole product."""

    @property
    def name_key(self) -> tuple[str, str] | None:
        """Section and key of the recipe that set its name; None if it is named after its inputs."""
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
        """Its name in messages."""
        return f"{self.noun} {self.name}"

    @property
    def determining(self) -> tuple["Product", ...]:
        """The inputs that determine its content; the others are only read."""
        return self.inputs

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """A key that is equal for equal products."""
        chosen = json.dumps(self.choices, sort_keys=True, default=str)
        return (self.kind, chosen, *(product.key for product in self.determining))

    def suffixed(self, name: str) -> str:
        """A name, with the variant's name added if another product already has it."""
        return f"{name}-{self.suffix}" if self.suffix else name

    def changes(self, stored: Identity, asked: Identity, *, layout: Layout) -> list[str]:
        """A line for each difference between the stored product of this name and this one."""
        return differences(restricted(stored, to=asked), asked)

    def without_input(self, missing: InputMissing) -> list[str]:
        """A line for each difference if a product of this name is stored, and an input of this one is missing."""
        return []

    def require_done(self, site: OpenSite) -> None:
        """Raise UsageError if it is missing; the text names the command that makes it."""
        if not self.is_done(site.layout):
            raise UsageError(f"Make {self.title} first: fuseline {self.command} RECIPE. It is not there yet.")


@dataclass(frozen=True, eq=False, kw_only=True)
class PartsProduct(Product):
    """A dataset, which a stage makes part by part."""

    @abstractmethod
    def stage(self, site: OpenSite) -> Stage:
        """The stage that makes its parts."""

    @property
    def split(self) -> str | None:
        """The split of the corpus whose parts it has; None if it has a single part."""
        return "train"

    @property
    def corpus(self) -> "PartsProduct | None":
        """The corpus whose parts it has; None for a corpus."""
        return next((product.corpus or product for product in self.inputs if isinstance(product, PartsProduct)), None)

    def description(self, site: OpenSite) -> dict[str, Any]:
        """Facts that do not determine the content; see `Dataset.description`."""
        return {} if self.corpus is None or self.split is None else {"corpus": self.corpus.name}

    def folder(self, layout: Layout) -> Path:
        """The folder of its dataset."""
        return layout.folder(self.kind, self.name)

    def folders(self, layout: Layout) -> list[Path]:
        return [self.folder(layout)]

    def stored(self, layout: Layout) -> Dataset | None:
        """The stored dataset with its name, of any identity."""
        folder = self.folder(layout)
        return Dataset.open(folder) if (folder / "dataset.json").exists() else None

    def planned_parts(self, plan: Mapping[str, Any] | None) -> list[int] | None:
        """Its parts, by the plan of its corpus; None if the corpus is not planned yet."""
        if self.split is None:
            return [0]
        return None if plan is None else [index for index, part in enumerate(plan["parts"]) if part["split"] == self.split]

    def expected_parts(self, layout: Layout) -> list[int] | None:
        """Its parts, by the stored plan of its corpus; None if there is none yet."""
        return self.planned_parts(read_plan((self.corpus or self).folder(layout)))

    def is_done(self, layout: Layout) -> bool:
        stored, parts = self.stored(layout), self.expected_parts(layout)
        return stored is not None and parts is not None and not stored.missing(parts)


def opened(site: Site) -> OpenSite | None:
    """The site, if models can be opened in it."""
    return cast(OpenSite, site) if site.is_open else None


Made = TypeVar("Made", bound=Product)


class Drawing(Protocol):
    """The graph of one recipe while it is built. It has all kinds before the current one."""

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
