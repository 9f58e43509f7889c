"""The report: bits per byte and perplexity of every model on the same held-out documents, by domain."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import duckdb
import numpy as np

from .comparison import Difference, differences

# Only documents that every model could read: the difficulty of the others would count only for some models.
_HELD_OUT = """
    WITH held_out AS (
        SELECT segments.kind, segments.model, corpus, doc_id, documents.split, domain, nll, n_scored, scored_bytes,
            (corpus, doc_id) IN (SELECT (corpus, doc_id) FROM quarantine WHERE kind = 'evaluations') AS is_left_out
        FROM segments JOIN documents USING (corpus, doc_id) WHERE kind IN ('evaluations', 'ensembles'))
"""
_SUMS = f"""{_HELD_OUT}
    SELECT corpus, split, domain, model, kind, sum(nll) AS nll, sum(n_scored) AS n_scored, sum(scored_bytes) AS scored_bytes,
        count(DISTINCT doc_id) AS documents
    FROM held_out WHERE NOT is_left_out GROUP BY ALL ORDER BY ALL
"""
# A document counts where the baseline and all models that are compared with it have it.
BY_DOCUMENT = f"""{_HELD_OUT}
    SELECT list(model ORDER BY model), list(nll ORDER BY model), list(scored_bytes ORDER BY model), any_value(domain) FROM (
        SELECT doc_id, domain, model, sum(nll) AS nll, sum(scored_bytes) AS scored_bytes FROM held_out
        WHERE NOT is_left_out AND corpus = $corpus AND split = $split AND list_contains($models, model) GROUP BY ALL)
    GROUP BY doc_id HAVING len(list(model)) = len($models) ORDER BY doc_id
"""
_LEFT_OUT = """
    SELECT corpus, split, count(DISTINCT doc_id) FROM quarantine JOIN documents USING (corpus, doc_id)
    WHERE kind = 'evaluations' GROUP BY ALL
"""


class Sums(NamedTuple):
    """A model's likelihood of some text; it can be summed."""

    nll: float  # nats
    n_scored: int  # tokens
    scored_bytes: int

    def __add__(self, other: "Sums") -> "Sums":  # type: ignore[override]
        return Sums(self.nll + other.nll, self.n_scored + other.n_scored, self.scored_bytes + other.scored_bytes)

    def metric(self, name: str) -> float:
        """`bpb` (bits per byte, comparable across tokenizers) or `perplexity` (per token, not comparable)."""
        if name == "bpb":
            return self.nll / (math.log(2) * max(self.scored_bytes, 1))
        return math.exp(self.nll / max(self.n_scored, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The results of all models on one split of one corpus."""

    corpus: str
    split: str
    documents: int
    left_out: int
    sums: dict[str, dict[str, Sums]]  # by model and domain
    mixed: frozenset[str]  # names of ensembles: their tokens are chunks that all members share

    def table(self, metric: str) -> tuple[list[str], list[tuple[str, list[float]]]]:
        """The columns after the model's name, and a row per model, worst first: the metric for each domain, and for the whole text."""
        domains = sorted({domain for by_domain in self.sums.values() for domain in by_domain})
        shown = domains if len(domains) > 1 else []
        none = Sums(math.nan, 0, 0)
        table = []
        for model, by_domain in self.sums.items():
            if metric == "perplexity" and model in self.mixed:
                continue
            total = sum(by_domain.values(), start=Sums(0.0, 0, 0))
            table.append((model, [sums.metric(metric) for sums in (*(by_domain.get(domain, none) for domain in shown), total)]))
        return [*(domain or "(none)" for domain in shown), "all"], sorted(table, key=lambda row: -row[1][-1])


def evaluations(connection: duckdb.DuckDBPyConnection) -> list[Evaluation]:
    """Every evaluation in the catalog, by corpus and split."""
    left_out = {(corpus, split): number for corpus, split, number in connection.execute(_LEFT_OUT).fetchall()}
    found: dict[tuple[str, str], dict[str, dict[str, Sums]]] = {}
    documents: dict[tuple[str, str], dict[str, int]] = {}
    mixed: set[str] = set()
    for corpus, split, domain, model, kind, nll, n_scored, scored_bytes, n_documents in connection.execute(_SUMS).fetchall():
        found.setdefault((corpus, split), {}).setdefault(model, {})[domain] = Sums(nll, int(n_scored), int(scored_bytes))
        documents.setdefault((corpus, split), {})[domain] = max(n_documents, documents.get((corpus, split), {}).get(domain, 0))
        if kind == "ensembles":
            mixed.add(model)
    return [
        Evaluation(
            corpus=key[0],
            split=key[1],
            documents=sum(documents[key].values()),
            left_out=left_out.get(key, 0),
            sums=sums,
            mixed=frozenset(mixed),
        )
        for key, sums in found.items()
    ]


def compared(connection: duckdb.DuckDBPyConnection, *, evaluation: Evaluation, baseline: str, models: Collection[str]) -> list[Difference]:
    """Each evaluated model, compared with the baseline over the documents; empty without the baseline."""
    names = sorted(name for name in {baseline, *models} if name in evaluation.sums)
    if baseline not in names or len(names) == 1:
        return []
    asked = {"corpus": evaluation.corpus, "split": evaluation.split, "models": names}
    rows = connection.execute(BY_DOCUMENT, asked).fetchall()
    if not rows:
        return []
    nll_DM, bytes_DM = (np.array([row[column] for row in rows], np.float64) for column in (1, 2))
    return differences(names, baseline=baseline, nll_DM=nll_DM, bytes_DM=bytes_DM)
