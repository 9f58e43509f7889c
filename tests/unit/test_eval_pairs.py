"""Two models side by side: significance that is right as often as it says."""

import numpy as np
import pytest
from fuseline.eval.pairs import holm, pairs


def likelihoods(random: np.random.Generator, *, documents: int, gain: float) -> tuple[np.ndarray, np.ndarray]:
    """Of documents that differ much, under two models of which the first is better by `gain` nats per byte on average."""
    n_bytes = random.integers(500, 3_000, documents).astype(float)
    hardness = random.normal(0.7, 0.2, documents)
    noise = random.normal(0, 0.02, (documents, 2))
    return (hardness[:, None] + noise - np.array([gain, 0])) * n_bytes[:, None], np.repeat(n_bytes[:, None], 2, axis=1)


def test_holm_is_that_of_the_paper():
    # Holm 1979: the smallest times 4, the next times 3, …, and never below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_a_clear_gain_is_significant_and_its_interval_holds_the_truth():
    nll_DM, bytes_DM = likelihoods(np.random.default_rng(1), documents=100, gain=0.05)
    (pair,) = pairs(nll_DM=nll_DM, bytes_DM=bytes_DM, domains=["a"] * 100)
    assert pair.is_significant
    assert pair.needed is None
    assert pair.low < -0.05 / np.log(2) < pair.high < 0
    assert pair.difference == pytest.approx(pair.bpb[0] - pair.bpb[1])


def test_the_number_of_documents_that_are_needed_is_enough_four_times_in_five():
    random = np.random.default_rng(2)
    small = [
        pairs(nll_DM=a, bytes_DM=b, domains=["a"] * 30)[0] for a, b in (likelihoods(random, documents=30, gain=0.004) for _ in range(40))
    ]
    needed = int(np.median([pair.needed for pair in small if pair.needed is not None and pair.difference < 0]))
    # Of differences that were not significant the larger ones are seen, so what is needed is about right, and rather less.
    found = [
        pairs(nll_DM=a, bytes_DM=b, domains=["a"] * len(a))[0].is_significant
        for a, b in (likelihoods(random, documents=3 * needed, gain=0.004) for _ in range(40))
    ]
    assert np.mean(found) > 0.6


def test_equal_models_are_called_different_no_more_often_than_the_level_says():
    """With 20 of 400 expected at 5 %, 37 or more come once in 5,000 such tests."""
    random = np.random.default_rng(3)
    wrong = 0
    for _ in range(400):
        nll_DM, bytes_DM = likelihoods(random, documents=40, gain=0.0)
        wrong += pairs(nll_DM=nll_DM, bytes_DM=bytes_DM, domains=["a"] * 40)[0].is_significant
    assert wrong < 37


def test_several_domains_are_adjusted():
    random = np.random.default_rng(4)
    nll_DM, bytes_DM = likelihoods(random, documents=120, gain=0.008)
    domains = [f"d{index % 4}" for index in range(120)]
    everything, *by_domain = pairs(nll_DM=nll_DM, bytes_DM=bytes_DM, domains=domains)
    alone = [pairs(nll_DM=nll_DM[index::4], bytes_DM=bytes_DM[index::4], domains=["a"] * 30)[0].p for index in range(4)]
    assert [pair.p for pair in by_domain] == pytest.approx(holm(alone))
    assert everything.documents == 120


def test_of_a_few_documents_nothing_is_significant():
    nll_DM, bytes_DM = likelihoods(np.random.default_rng(5), documents=5, gain=0.3)
    assert not pairs(nll_DM=nll_DM, bytes_DM=bytes_DM, domains=["a"] * 5)[0].is_significant
