"""Two models side by side on the same documents, domain by domain: intervals, significance, and how many documents would be needed.

The interval is that of `comparison`. The p-value is that of the same paired bootstrap: twice the share of resamples on the other side of 0
(Efron and Tibshirani 1993, chapter 16). Several domains are several questions, so their p-values are adjusted by Holm (1979).
"""

import math
from dataclasses import dataclass, replace

import duckdb
import numpy as np
from numpy.typing import NDArray

from ..store.errors import UsageError
from .comparison import LEAST_DOCUMENTS, bits_per_byte, resampled_bpb
from .report import BY_DOCUMENT, Evaluation

_QUANTILES = 1.959964, 0.841621  # of the normal distribution: 5 % on both sides, and 80 % power


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Bits per byte of two models on the documents of one domain; less is better."""

    domain: str | None  # None: all documents
    documents: int
    scored_bytes: tuple[int, int]  # the model's, the other's; an ensemble leaves out the first bytes of each segment
    bpb: tuple[float, float]  # the model's, the other's
    difference: float  # below 0 the model is better
    low: float  # of the 95 % interval
    high: float
    p: float  # for domains adjusted by Holm's method
    needed: int | None  # documents with which such a difference would be significant 4 times in 5; None where it is significant already

    @property
    def is_significant(self) -> bool:
        """Whether the difference is more than chance, at 5 %, over enough documents."""
        return self.documents >= LEAST_DOCUMENTS and self.p < 0.05 and not self.low <= 0 <= self.high


def compare(connection: duckdb.DuckDBPyConnection, *, evaluation: Evaluation, model: str, other: str) -> list[Pair]:
    """All documents first, then each domain.

    Raises:
        UsageError: one of the models was not evaluated on this text.
    """
    for name in (model, other):
        if name not in evaluation.sums:
            known = ", ".join(sorted(evaluation.sums))
            raise UsageError(f"{name!r} was not evaluated on split {evaluation.split!r}. Choose two of: {known}.")
    names = sorted({model, other})
    if len(names) == 1:
        raise UsageError(f"Choose two different models: both are {model!r}.")
    asked = {"corpus": evaluation.corpus, "split": evaluation.split, "models": names}
    rows = connection.execute(BY_DOCUMENT, asked).fetchall()
    if not rows:
        raise UsageError(f"{model!r} and {other!r} have no document of split {evaluation.split!r} in common. Evaluate both first.")
    nll_DM, bytes_DM = (np.array([row[column] for row in rows], np.float64).reshape(len(rows), 2) for column in (1, 2))
    if names[0] != model:
        nll_DM, bytes_DM = nll_DM[:, ::-1], bytes_DM[:, ::-1]
    return pairs(nll_DM=nll_DM, bytes_DM=bytes_DM, domains=[row[3] for row in rows])


def pairs(*, nll_DM: NDArray[np.float64], bytes_DM: NDArray[np.float64], domains: list[str], seed: int = 0) -> list[Pair]:
    """The comparison of two models, M = 2.

    Args:
        nll_DM: negative log-likelihood of each document, in nats, under the model and the other.
        bytes_DM: scored bytes of each document.
        domains: of the documents.
        seed: of the resamples.
    """
    domain_D = np.array(domains)
    everything = _pair(None, nll_DM, bytes_DM, seed=seed)
    names = sorted(set(domains))
    if len(names) < 2:
        return [everything]
    found = [_pair(name, nll_DM[domain_D == name], bytes_DM[domain_D == name], seed=seed) for name in names]
    adjusted = holm([each.p for each in found])
    return [everything, *(_with_p(each, p) for each, p in zip(found, adjusted, strict=True))]


def holm(p_values: list[float]) -> list[float]:
    """Adjust the p-values of several questions, so that below 0.05 the chance that any of them is below by chance is 5 % (Holm 1979)."""
    order = np.argsort(p_values)
    adjusted, most = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        most = max(most, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = most
    return adjusted


def _pair(domain: str | None, nll_DM: NDArray[np.float64], bytes_DM: NDArray[np.float64], *, seed: int) -> Pair:
    bpb_M = bits_per_byte(nll_DM.sum(0), bytes_DM.sum(0))
    resampled_RM = resampled_bpb(nll_DM, bytes_DM, seed=seed)
    differences_R = resampled_RM[:, 0] - resampled_RM[:, 1]
    low, high = np.percentile(differences_R, [2.5, 97.5])
    difference, n = float(bpb_M[0] - bpb_M[1]), len(nll_DM)
    p = min(1.0, 2 * float(min((differences_R <= 0).mean(), (differences_R >= 0).mean())) + 1 / len(differences_R))
    spread = float(differences_R.std())
    needed = None
    if low <= 0 <= high and difference != 0:
        needed = math.ceil(n * (sum(_QUANTILES) * spread / difference) ** 2)
    return Pair(
        domain=domain,
        documents=n,
        scored_bytes=(int(bytes_DM[:, 0].sum()), int(bytes_DM[:, 1].sum())),
        bpb=(float(bpb_M[0]), float(bpb_M[1])),
        difference=difference,
        low=float(low),
        high=float(high),
        p=p,
        needed=needed,
    )


def _with_p(pair: Pair, p: float) -> Pair:
    return replace(pair, p=p)
