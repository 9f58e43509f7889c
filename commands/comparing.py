"""`fuseline eval compare`: two models side by side."""

import dataclasses
import json

from ..eval.comparison import LEAST_DOCUMENTS
from ..eval.pairs import Pair, compare
from ..eval.report import evaluations
from ..store import catalog
from ..store.errors import UsageError
from ..store.workspace import Workspace
from .console import show_table
from .terminal import say

_NEARLY = 0.002  # share of the bytes: models differ by the length of each segment's first token


def show_comparison(workspace: Workspace, *, model: str, other: str, split: str | None, as_json: bool) -> None:
    """A table for each split on which both models were evaluated.

    Raises:
        UsageError: the split does not exist, or one of the models was not evaluated on it.
    """
    with catalog.reading(workspace) as connection:
        found = evaluations(connection)
        splits = sorted({item.split for item in found})
        chosen = [item for item in found if split in (None, item.split)]
        if not chosen:
            known = f"--split ({split}) must be one of: {', '.join(splits)}." if splits else "No model has been evaluated yet."
            raise UsageError(known if splits else f"{known} Run `fuseline eval RECIPE` first.")
        both = [item for item in chosen if {model, other} <= item.sums.keys()] or chosen[:1]
        compared = {(item.corpus, item.split): compare(connection, evaluation=item, model=model, other=other) for item in both}
    if as_json:
        records = [
            {"corpus": corpus, "split": name, "model": model, "other": other, "pairs": [dataclasses.asdict(pair) for pair in pairs]}
            for (corpus, name), pairs in compared.items()
        ]
        say(json.dumps(records, indent=1))
        return
    for (corpus, name), pairs in compared.items():
        say(f"Bits per byte of {model} and {other} on split {name} of {corpus} (less is better):")
        columns = ["domain", "documents", model, other, "difference", "95 % interval", "p", "result"]
        show_table(columns, [_row(pair, model=model) for pair in pairs], right=[False, *[True] * 6, False])
        ours, others = pairs[0].scored_bytes
        if abs(ours - others) > _NEARLY * max(ours, others):
            say(f"{model} scores {ours:,} bytes of these documents and {other} {others:,}: a small difference may come from that.")


def _row(pair: Pair, *, model: str) -> list[str]:
    domain = "all" if pair.domain is None else pair.domain or "(none)"
    interval = f"{pair.low:+.4f} to {pair.high:+.4f}"
    figures = [f"{value:.4f}" for value in pair.bpb]
    return [domain, f"{pair.documents:,}", *figures, f"{pair.difference:+.4f}", interval, f"{pair.p:.2g}", _says(pair, model=model)]


def _says(pair: Pair, *, model: str) -> str:
    if pair.is_significant:
        return f"{model} is {'better' if pair.difference < 0 else 'worse'}"
    if pair.documents < LEAST_DOCUMENTS:
        return f"not significant: at least {LEAST_DOCUMENTS} documents are needed"
    if pair.difference == 0:
        return "no difference"
    if pair.needed is None:
        return "not significant, because several domains are compared"
    return f"not significant: about {pair.needed:,} documents are needed"
