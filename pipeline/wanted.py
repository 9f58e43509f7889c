"""What a recipe wants of a workspace, product by product: there, missing, or made from different inputs.

Read from files alone, as `store.status` is: neither a model nor the source of the corpus is opened. That one of these was changed since is
only noticed by a run.
"""

from dataclasses import dataclass
from typing import Literal

from ..ingest.models import ModelFolder
from ..store.corpus_plan import read_plan
from ..store.dataset import Dataset
from ..store.fingerprint import Identity
from ..store.layout import Layout
from ..store.status import DatasetStatus, TrainingStatus, dataset_statuses, training_statuses
from .graph import Graph
from .products.product import InputMissing, PartsProduct, Product
from .products.trained import ModelProduct
from .recipe import Recipe

State = Literal["done", "incomplete", "missing", "different inputs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One product of a recipe."""

    kind: str
    name: str
    variants: list[str]  # that need it; the recipe itself is `base`
    state: State
    expected_parts: int | None  # None where the corpus is not planned yet, and of trainings and merges
    differences: list[str]  # between what is there under this name and what the recipe asks for
    status: DatasetStatus | TrainingStatus | None  # of what is there


class Seen:
    """A workspace that is only looked at. Implements `Site`."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._identities: dict[Product, Identity] = {}

    def dataset(self, product: PartsProduct) -> Dataset:
        """What is stored under the product's name, whatever its identity.

        Raises:
            InputMissing: nothing is.
        """
        stored = product.stored(self.layout)
        if stored is None:
            raise InputMissing(product)
        return stored

    def identity(self, product: Product) -> Identity:
        """What of the identity can be told without the models."""
        if product not in self._identities:
            self._identities[product] = product.identity(self)
        return self._identities[product]

    def models(self, recipe: Recipe) -> None:
        """None: models are not opened."""

    def model(self, product: Product) -> ModelFolder | None:
        """None: models are not opened."""
        return None


def wanted(graph: Graph, *, layout: Layout) -> list[Wanted]:
    """Everything that a recipe makes, in order."""
    datasets = {(status.kind, status.name): status for status in dataset_statuses(layout)}
    trainings = {status.name: status for status in training_statuses(layout)}
    site, found = Seen(layout), []
    for product in graph:
        status: DatasetStatus | TrainingStatus | None
        if isinstance(product, PartsProduct):
            status = datasets.get((product.kind, product.name))
        else:
            status = trainings.get(product.name) if product.kind == "training" else None
        changed = _differences(product, site=site)
        found.append(
            Wanted(
                kind=product.kind,
                name=product.name,
                variants=graph.variants_of(product),
                state="different inputs" if changed else _state(product, layout=layout, status=status),
                expected_parts=_expected_parts(product, layout=layout, status=status),
                differences=changed,
                status=status,
            )
        )
    return found


def _state(product: Product, *, layout: Layout, status: DatasetStatus | TrainingStatus | None) -> State:
    if product.is_done(layout):
        return "done"
    is_begun = bool(status.parts) if isinstance(status, DatasetStatus) else status is not None
    return "incomplete" if is_begun else "missing"


def _expected_parts(product: Product, *, layout: Layout, status: DatasetStatus | TrainingStatus | None) -> int | None:
    if not isinstance(product, PartsProduct):
        return None
    if isinstance(status, DatasetStatus):
        return status.expected_parts
    corpus = product.corpus or product
    parts = product.planned_parts(read_plan(layout.folder("corpus", corpus.name)))
    return None if parts is None else len(parts)


def _differences(product: Product, *, site: Seen) -> list[str]:
    """Between what is stored under a product's name and what of its identity can be told; of an unfinished training, a run compares it."""
    stored: Identity | None
    if isinstance(product, PartsProduct):
        dataset = product.stored(site.layout)
        stored = None if dataset is None else dataset.identity
    else:
        assert isinstance(product, ModelProduct)
        stored = product.finished_identity(site.layout)
    if stored is None:
        return []
    try:
        changed = product.changes(stored, site.identity(product), layout=site.layout)
    except InputMissing as error:
        return product.without_input(error)
    if changed or isinstance(product, PartsProduct):
        return changed
    # A model that is finished: what it was made from may have been replaced, or may be of another recipe.
    return [f"learned from {needed.kind} made from different inputs" for needed in product.determining if _differences(needed, site=site)]
