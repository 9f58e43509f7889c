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

_LONG_DIGEST = re.compile(r'"([0-9a-f]{12})[0-9a-f]{52}"')


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """A name that is taken."""

    table: str  # table of the recipe with the key that sets the name: `[fusion]`
    key: str
    name: str  # value of the key; the names of the products may be longer
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
    for (table, key), name in {(conflict.table, conflict.key): conflict.name for conflict in found}.items():
        lines += [f"  {table}", f'  {key} = "{_free_name(name, layout=layout)}"']
    folders = " ".join(str(folder) for conflict in found for folder in conflict.folders if folder.exists())
    lines.append(f"Or remove the old data first: {folders}")
    raise FingerprintMismatch("\n".join(lines))


def _short(line: str) -> str:
    return _LONG_DIGEST.sub(r"\1…", line)


def _free_name(name: str, *, layout: Layout) -> str:
    """The name with the first number from 2 that starts no existing name: products of one source, or of all, are named `<name>-…`."""
    stem = re.sub(r"-\d+$", "", name)
    taken = [path.name for kind in ("targets", "runs", "exports") for path in (layout.root / kind).glob("*")]
    numbered = (f"{stem}-{n}" for n in itertools.count(2))
    return next(free for free in numbered if not any(f"{other}-".startswith(f"{free}-") for other in taken))
