"""The graph of the products of a recipe and its variants. Equal products of several variants are one product.

for product in products(recipe): ...        # each product comes after its inputs
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ..store.errors import UsageError
from .products.aligned import Alignment, TokenMatches, VocabularyMap
from .products.corpus import Corpus
from .products.ensembles import Ensemble
from .products.forward import Distributions, Evaluation, MadeEvaluation
from .products.fused import Targets
from .products.merged import Merged
from .products.product import Made, Product
from .products.trained import ModelProduct, Trained
from .recipe import BASE, Recipe

# All kinds of products, each after its inputs.
KINDS: list[type[Product]] = [
    Corpus,
    Distributions,
    TokenMatches,
    VocabularyMap,
    Alignment,
    Targets,
    Evaluation,
    Ensemble,
    Trained,
    Merged,
    MadeEvaluation,
]
Kind = TypeVar("Kind", bound=Product)


@dataclass(frozen=True, slots=True)
class Graph:
    """The products of a recipe and its variants, in order."""

    products: tuple[Product, ...]
    by_variant: dict[str, tuple[Product, ...]]  # key of the recipe itself: `BASE`
    recipes: dict[str, Recipe]  # by variant
    _users: dict[Product, list[Recipe]] = field(repr=False)

    def __iter__(self) -> Iterator[Product]:
        return iter(self.products)

    def of_kind(self, kind: type[Kind]) -> list[Kind]:
        """The products of a class, in graph order."""
        return [product for product in self.products if isinstance(product, kind)]

    def users(self, product: Product) -> list[Recipe]:
        """The recipes of this graph that need a product, at least one."""
        users = [recipe for recipe in self._users[product] if any(recipe is each for each in self.recipes.values())]
        return users or [product.recipe]

    def variants_of(self, product: Product) -> list[str]:
        """Names of the variants that need a product."""
        return [name for name, products in self.by_variant.items() if product in products]

    def only(self, variant: str) -> "Graph":
        """The graph of one variant.

        Raises:
            UsageError: the recipe does not have the variant.
        """
        if variant not in self.by_variant:
            raise UsageError(f"--variant ({variant}) must be one of: {', '.join(self.by_variant)}.")
        found = self.by_variant[variant]
        return replace(self, products=found, by_variant={variant: found}, recipes={variant: self.recipes[variant]})

    @property
    def made_models(self) -> list[ModelProduct]:
        """The models that are made."""
        return self.of_kind(ModelProduct)

    def needs_made_model(self, product: Product) -> bool:
        """Whether a product is a model that the recipe makes, or depends on one."""
        return isinstance(product, ModelProduct) or any(map(self.needs_made_model, product.inputs))


def products(recipe: Recipe) -> Graph:
    """The graph of a recipe.

    Raises:
        UsageError: two variants use the same name for different products.
    """
    known: dict[tuple[object, ...], Product] = {}
    named: dict[tuple[str, str], Product] = {}
    users: dict[Product, list[Recipe]] = {}
    by_variant, recipes = {}, {BASE: recipe} | {variant.name: recipe.with_variant(variant) for variant in recipe.variants}
    for name, asked in recipes.items():
        drawing = _Drawing(asked, variant=name, known=known, named=named)
        for kind in KINDS:
            for product in kind.of(drawing):
                users.setdefault(drawing.add(product), []).append(asked)
        by_variant[name] = _ordered(drawing.products)
    return Graph(_ordered(known.values()), by_variant, recipes, users)


class _Drawing:
    """Builds the graph of one variant, kind by kind. Implements `Drawing`."""

    def __init__(
        self, recipe: Recipe, *, variant: str, known: dict[tuple[object, ...], Product], named: dict[tuple[str, str], Product]
    ) -> None:
        """`known` and `named` have the products of the earlier variants, by key, and by kind and name."""
        self.recipe, self.variant, self.products = recipe, variant, list[Product]()
        self._known, self._named = known, named
        self._roles: dict[tuple[type[Product], str], Product] = {}

    def get(self, kind: type[Made], role: str) -> Made:
        """A product by its role."""
        found = self._roles[kind, role]
        assert isinstance(found, kind)
        return found

    def models(self) -> Sequence[ModelProduct]:
        """The models that are made."""
        return [product for product in self.products if isinstance(product, ModelProduct)]

    def add(self, product: Product) -> Product:
        """Add a product, and return it, or the equal one of an earlier variant. The product gets a free name."""
        found = self._known.get(product.key)
        if found is None:
            found = product
            if _place(product) in self._named:
                found = replace(product, suffix=self.variant)
            if _place(found) in self._named:
                raise UsageError(
                    f"Rename the variant {self.variant!r}, or set a name in it: the variants use {found.kind}/{found.name} for different "
                    "products."
                )
            self._known[found.key] = self._named[_place(found)] = found
        self._roles[type(product), product.role] = found
        self.products.append(found)
        return found


def _place(product: Product) -> tuple[str, str]:
    """Where a product is: all models that are made share `exports/`, the other kinds have a folder each."""
    return ("exports" if isinstance(product, ModelProduct) else product.kind, product.name)


def _ordered(found: Iterable[Product]) -> tuple[Product, ...]:
    """Sort products after their inputs. Those with `is_last` come at the end."""
    ordered: dict[Product, None] = {}

    def place(product: Product) -> None:
        for needed in product.inputs:
            place(needed)
        ordered.setdefault(product)

    for product in sorted(found, key=lambda product: product.is_last):
        place(product)
    return tuple(ordered)
