"""Names in a recipe that the workspace already uses for different data. All are reported together, with free names.

Targets and trainings depend on everything before them. With one more source, or another target, they change. The stored distributions and
alignments of each model stay the same and are used again.
"""

import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..store.errors import FingerprintMismatch
from ..store.layout import Layout
from .opened import Opened
from .products.fused import Targets
from .products.merged import Merged
from .products.product import Product
from .products.trained import Trained
from .recipe import BASE

_LONG_DIGEST = re.compile(r'"([0-9a-f]{12})[0-9a-f]{52}"')


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """A name that is taken."""

    table: str  # table of the recipe with the key that sets the name: `[fusion]`
    key: str
    name: str  # value of the key; the names of the products may be longer
    variants: Collection[str]  # names of the recipe's variants, if the name is a variant's: names of products end with it
    what: str  # the product with this name: `targets/fused`, `training fused`
    folders: Sequence[Path]  # folders of the product
    differences: Sequence[str]  # between the stored product and the one in the recipe


def conflicts(site: Opened, *, among: Collection[Product] | None = None) -> list[Conflict]:
    """Stored targets, trainings and merged models whose identity differs from the recipe's. The corpus must be there."""
    found = []
    for product in site.graph if among is None else among:
        if isinstance(product, Targets):
            dataset = product.stored(site.layout)
            stored, asked, what = None if dataset is None else dataset.identity, site.identity(product), f"targets/{product.name}"
        elif isinstance(product, Trained):
            stored, asked, what = product.stored_identity(site.layout), site.identity(product), product.title
        elif isinstance(product, Merged):
            stored, asked, what = product.finished_identity(site.layout), product.planned(site), f"exports/{product.name}"
        else:
            continue
        changed = [] if stored is None else product.changes(stored, asked, layout=site.layout)
        if changed:
            table, key = _named_by(product, site=site)
            found.append(
                Conflict(
                    table=table,
                    key=key,
                    name=product.recipe_name,
                    variants=list(site.graph.recipes) if product.suffix else (),
                    what=what,
                    folders=product.folders(site.layout),
                    differences=changed,
                )
            )
    return found


def _named_by(product: Targets | Trained | Merged, *, site: Opened) -> tuple[str, str]:
    """The table of the recipe and the key that give the name: of the recipe itself, or of a variant."""
    section, key = product.name_key
    variant = next((name for name, recipe in site.graph.recipes.items() if recipe is product.recipe), BASE)
    if product.suffix:
        return f"[[variants]]  # {product.suffix}", "name"
    return (f"[{section}]", key) if variant == BASE else (f"[[variants]]  # {variant}", f"{section}.{key}")


def require_free(found: Sequence[Conflict], *, layout: Layout) -> None:
    """Raise if a name is taken.

    Raises:
        FingerprintMismatch: a name is taken; the text lists each difference, and a free name for each.
    """
    if not found:
        return
    lines = ["The workspace already uses names of the recipe for different data:"]
    for conflict in found:
        lines += [f"  {conflict.what}", *(f"    {_short(line)}" for line in conflict.differences)]
    lines.append("Set new names in the recipe. Stored distributions and alignments are used again.")
    for conflict in {(conflict.table, conflict.key): conflict for conflict in found}.values():
        lines += [f"  {conflict.table}", f'  {conflict.key} = "{_free_name(conflict, layout=layout)}"']
    folders = " ".join(str(folder) for conflict in found for folder in conflict.folders if folder.exists())
    lines.append(f"Or remove the old data first: {folders}")
    raise FingerprintMismatch("\n".join(lines))


def _short(line: str) -> str:
    return _LONG_DIGEST.sub(r"\1…", line)


def _free_name(conflict: Conflict, *, layout: Layout) -> str:
    """The name with the first number from 2 that no name uses.

    Products of one source, or of all, are named `<name>-…`, those of a variant `…-<variant>`.
    """
    stem = re.sub(r"-\d+$", "", conflict.name)
    taken = [path.name for kind in ("targets", "runs", "exports") for path in (layout.root / kind).glob("*")]
    numbered = (f"{stem}-{n}" for n in itertools.count(2))
    if conflict.variants:
        return next(free for free in numbered if free not in conflict.variants and not any(each.endswith(f"-{free}") for each in taken))
    return next(free for free in numbered if not any(f"{other}-".startswith(f"{free}-") for other in taken))
