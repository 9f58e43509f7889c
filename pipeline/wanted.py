"""The state of each product of a recipe in a workspace: done, missing, or made from different inputs.

Like `store.status`, it reads only the workspace's files. It does not open the models or the source of the corpus. Only a run notices if
one of these has changed.
"""

from dataclasses import dataclass
from typing import Literal

from ..store.dataset import Dataset
from ..store.fingerprint import Identity
from ..store.layout import Layout
from ..store.status import DatasetStatus, TrainingStatus, dataset_statuses, training_statuses
from .graph import Graph
from .products.product import InputMissing, PartsProduct, Product
from .products.trained import ModelProduct

State = Literal["done", "incomplete", "missing", "different inputs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A product of a recipe."""

    kind: str
    name: str
    variants: list[str]  # variants that need it; the recipe itself is `base`
    state: State
    expected_parts: int | None  # None if the corpus is not planned yet, and for trainings and merges
    differences: list[str]  # between the stored product of this name and the recipe
    status: DatasetStatus | TrainingStatus | None  # status of the stored product


class Seen:
    """A workspace that is only read. Implements `Site`."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.is_open = layout, False
        self._identities: dict[Product, Identity] = {}

    def dataset(self, product: PartsProduct) -> Dataset:
        """The dataset with the product's name, of any identity.

        Raises:
            InputMissing: there is none.
        """
        stored = product.stored(self.layout)
        if stored is None:
            raise InputMissing(product)
        return stored

    def identity(self, product: Product) -> Identity:
        """The part of the identity that is known without the models."""
        if product not in self._identities:
            self._identities[product] = product.identity(self)
        return self._identities[product]


def wanted(graph: Graph, *, layout: Layout) -> list[Wanted]:
    """All products of a recipe, in order."""
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
    parts = product.expected_parts(layout)
    return None if parts is None else len(parts)


def _differences(product: Product, *, site: Seen) -> list[str]:
    """Differences between the stored and the known identity of a product. An unfinished training is compared by a run."""
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
    # The inputs of a finished model may have been replaced, or may belong to another recipe.
    return [f"learned from {needed.kind} made from different inputs" for needed in product.determining if _differences(needed, site=site)]
