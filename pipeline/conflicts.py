"""Names of a recipe under which the workspace has something else already: reported all at once, with names that are free.

Targets and trainings depend on everything before them. With one more source, or another target, they are others than before, while what is
stored of each model, and its alignment, stays as it is and is used again.
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

_LONG_DIGEST = re.compile(r'"([0-9a-f]{12})[0-9a-f]{52}"')


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """One name that is taken."""

    table: str  # of the recipe, with the key that gives the name: `[fusion]`
    key: str
    name: str  # that they give; what is made with it may have a longer one
    what: str  # has this name: `targets/fused`, `training fused`
    folders: Sequence[Path]  # that hold it
    differences: Sequence[str]  # between what is there and what the recipe asks for


def conflicts(site: Opened, *, among: Collection[Product] | None = None) -> list[Conflict]:
    """Targets, trainings and merged models of the recipe's names that are of another identity; the corpus must be there."""
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
            section, key = product.name_key
            table = f"[[variants]]  # {product.suffix}" if product.suffix else f"[{section}]"
            found.append(
                Conflict(
                    table=table,
                    key="name" if product.suffix else key,
                    name=product.recipe_name,
                    what=what,
                    folders=product.folders(site.layout),
                    differences=changed,
                )
            )
    return found


def require_free(found: Sequence[Conflict], *, layout: Layout) -> None:
    """Raise what is taken, if anything is.

    Raises:
        FingerprintMismatch: with each difference, and a name for each that nothing has.
    """
    if not found:
        return
    lines = ["The workspace has something else under names of the recipe:"]
    for conflict in found:
        lines += [f"  {conflict.what}", *(f"    {_short(line)}" for line in conflict.differences)]
    lines.append("What is stored of each model, and its alignment, is used again. Give what is new names of its own, in the recipe:")
    for (table, key), name in {(conflict.table, conflict.key): conflict.name for conflict in found}.items():
        lines += [f"  {table}", f'  {key} = "{_free_name(name, layout=layout)}"']
    folders = " ".join(str(folder) for conflict in found for folder in conflict.folders if folder.exists())
    lines.append(f"To make it in place of what is there, remove first: {folders}")
    raise FingerprintMismatch("\n".join(lines))


def _short(line: str) -> str:
    return _LONG_DIGEST.sub(r"\1…", line)


def _free_name(name: str, *, layout: Layout) -> str:
    """The name with the first number from 2 with which nothing begins: what is made for one source, or for all, is named `<name>-…`."""
    stem = re.sub(r"-\d+$", "", name)
    taken = [path.name for kind in ("targets", "runs", "exports") for path in (layout.root / kind).glob("*")]
    numbered = (f"{stem}-{n}" for n in itertools.count(2))
    return next(free for free in numbered if not any(f"{other}-".startswith(f"{free}-") for other in taken))
