"""The paired bootstrap against one written out document by document, and against what is known of random documents."""

import math

import numpy as np
import pytest
from fuseline.commands.report import _result
from fuseline.eval import comparison
from fuseline.eval.comparison import Difference, differences


def documents(n: int, *, gain: float = 0.0, seed: int = 0) -> dict[str, np.ndarray]:
    """Documents of very different difficulty, on which two models differ by `gain` bits per byte and some noise."""
    random = np.random.default_rng(seed)
    bytes_D = random.integers(500, 4000, n).astype(np.float64)
    base_D = bytes_D * random.uniform(0.3, 2.0, n)
    other_D = base_D + bytes_D * (random.normal(0, 0.02, n) - gain * math.log(2))
    return {"nll_DM": np.stack([base_D, other_D], axis=1), "bytes_DM": np.stack([bytes_D, bytes_D], axis=1)}


def test_the_interval_is_that_of_documents_drawn_one_by_one():
    facts = documents(25, gain=0.01)
    (found,) = differences(["clm", "fused"], baseline="clm", **facts)
    random = np.random.default_rng(1)
    resampled = []
    for _ in range(4000):
        drawn = random.integers(0, 25, 25)
        clm, fused = facts["nll_DM"][drawn].sum(0) / facts["bytes_DM"][drawn].sum(0) / math.log(2)
        resampled.append(fused - clm)
    expected = np.percentile(resampled, [2.5, 97.5])
    # The quantile of n draws has the error sqrt(q (1 - q) / n) / density; 4 of both samples' errors.
    error = 4 * math.sqrt(0.025 * 0.975 * (1 / 4000 + 1 / 10_000)) * np.std(resampled) / 0.058
    assert [found.low, found.high] == pytest.approx(expected, abs=error)
    clm, fused = facts["nll_DM"].sum(0) / facts["bytes_DM"].sum(0) / math.log(2)
    assert (found.model, found.baseline, found.documents, found.bpb) == ("fused", "clm", 25, fused - clm)


def test_nineteen_of_twenty_intervals_hold_the_truth(monkeypatch):
    monkeypatch.setattr(comparison, "_RESAMPLES", 1000)
    hits = 0
    for seed in range(300):
        (found,) = differences(["clm", "fused"], baseline="clm", seed=seed, **documents(60, gain=0.004, seed=seed))
        hits += found.low <= -0.004 <= found.high
    assert 0.95 - 4 * math.sqrt(0.95 * 0.05 / 300) < hits / 300 < 1


def test_what_makes_a_document_hard_for_both_models_cancels():
    facts = documents(18)
    facts["nll_DM"][:, 1] = facts["nll_DM"][:, 0] - 0.003 * math.log(2) * facts["bytes_DM"][:, 0]
    (found,) = differences(["clm", "fused"], baseline="clm", **facts)
    assert [found.low, found.bpb, found.high] == pytest.approx([-0.003] * 3, abs=1e-12)
    assert found.is_clear


def test_a_few_documents_are_no_proof():
    facts = documents(10, gain=1.0)
    assert [_compared(facts, n=n).is_clear for n in (1, 9, 10)] == [False, False, True]
    assert "too few documents" in _result(_compared(facts, n=1))
    assert _result(_compared(facts, n=10)) == "better"


def _compared(facts: dict[str, np.ndarray], *, n: int) -> Difference:
    (found,) = differences(["clm", "fused"], baseline="clm", **{name: values[:n] for name, values in facts.items()})
    return found


def test_noise_is_not_called_a_difference():
    (found,) = differences(["fused", "clm"], baseline="clm", nll_DM=documents(18)["nll_DM"][:, ::-1], bytes_DM=documents(18)["bytes_DM"])
    assert found.low < 0 < found.high
    assert not found.is_clear


def test_many_documents_are_drawn_in_pieces_and_the_seed_alone_decides(monkeypatch):
    facts = documents(200)
    whole = differences(["clm", "fused"], baseline="clm", **facts)
    monkeypatch.setattr(comparison, "_DRAWN", 200 * 700)  # pieces of 700 resamples
    (found,), (expected,) = differences(["clm", "fused"], baseline="clm", **facts), whole
    assert [found.low, found.high] == pytest.approx([expected.low, expected.high], rel=1e-9)
    assert differences(["clm", "fused"], baseline="clm", seed=1, **facts) != whole
