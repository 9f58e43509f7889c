"""Whether one model is better than another on the same documents: a paired bootstrap over documents.

Documents are drawn with replacement, the same for all models, so that the difficulty of the texts cancels (Efron and Tibshirani 1993,
chapter 13; Koehn 2004 for paired models). A difference whose interval contains 0 may be chance.

Axes: D documents, M models, R resamples.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# With 10 documents an interval of 95 % holds the truth 9 times in 10 (Student's t); with fewer less often; with one it is a point.
LEAST_DOCUMENTS = 10
_RESAMPLES = 10_000
_DRAWN = 1 << 24  # documents drawn at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Bits per byte of a model minus those of a baseline; a negative value is better."""

    model: str
    baseline: str
    documents: int
    bpb: float
    low: float  # of the 95 % interval
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval is on one side of 0, and there are enough documents."""
        return self.has_enough and (self.low > 0 or self.high < 0)

    @property
    def has_enough(self) -> bool:
        """Whether there are at least `LEAST_DOCUMENTS`."""
        return self.documents >= LEAST_DOCUMENTS


def differences(
    names: list[str], *, baseline: str, nll_DM: NDArray[np.float64], bytes_DM: NDArray[np.float64], seed: int = 0
) -> list[Difference]:
    """The difference of each model except the baseline, in order.

    Args:
        names: the names of the M models, including `baseline`.
        baseline: the model that the others are compared with.
        nll_DM: negative log-likelihood of each document, in nats.
        bytes_DM: its scored bytes.
        seed: of the resamples.
    """
    n_documents, base = len(nll_DM), names.index(baseline)
    found_M = bits_per_byte(nll_DM.sum(0), bytes_DM.sum(0))
    resampled_RM = resampled_bpb(nll_DM, bytes_DM, seed=seed)
    low_M, high_M = np.percentile(resampled_RM - resampled_RM[:, [base]], [2.5, 97.5], axis=0)
    return [
        Difference(
            model=name,
            baseline=baseline,
            documents=n_documents,
            bpb=float(found_M[m] - found_M[base]),
            low=float(low_M[m]),
            high=float(high_M[m]),
        )
        for m, name in enumerate(names)
        if m != base
    ]


def resampled_bpb(nll_DM: NDArray[np.float64], bytes_DM: NDArray[np.float64], *, seed: int) -> NDArray[np.float64]:
    """Bits per byte of each model on each resample: as many documents as there are, drawn with replacement."""
    n_documents, random = len(nll_DM), np.random.default_rng(seed)
    resamples = max(1_000, min(_RESAMPLES, 16 * _DRAWN // n_documents))  # for a million documents fewer are enough, and take seconds
    blocks = []
    for first in range(0, resamples, rows := max(1, _DRAWN // n_documents)):
        size = min(rows, resamples - first)
        times_RD = random.multinomial(n_documents, np.full(n_documents, 1 / n_documents), size=size).astype(np.float64)
        blocks.append(bits_per_byte(times_RD @ nll_DM, times_RD @ bytes_DM))
    return np.concatenate(blocks)


def bits_per_byte(nll: NDArray[np.float64], n_bytes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of likelihoods in nats."""
    return nll / (math.log(2) * np.maximum(n_bytes, 1))
