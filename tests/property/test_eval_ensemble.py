"""Ensembles of outputs against a computation chunk by chunk in Python floats, and what must hold whatever the models say."""

import math
from itertools import pairwise

import numpy as np
import pytest
from fuseline.eval.ensemble import Chunks, Tokens, mixed, shared_chunks
from hypothesis import given, settings
from hypothesis import strategies as st


@st.composite
def readings(draw, models: int | None = None) -> list[Tokens]:
    """The same segments, cut into tokens and scored by several models; some models begin with a bos, some have left segments out."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))  # bytes of the segments
    doc_ids = sorted(draw(st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths))))
    numbers = [doc_ids[:index].count(doc_id) for index, doc_id in enumerate(doc_ids)]
    found = []
    for _ in range(models or draw(st.integers(1, 4))):
        kept = [draw(st.booleans()) or index == 0 for index in range(len(lengths))]
        has_bos = draw(st.booleans())
        ends, logprobs, offsets = [], [], [0]
        for index in np.flatnonzero(kept):
            cuts = sorted(draw(st.sets(st.integers(1, lengths[index])))) if lengths[index] > 1 else []
            token_ends = [0] * has_bos + [cut for cut in cuts if cut < lengths[index]] + [lengths[index]]
            values = [draw(st.floats(-20, -1e-3)) for _ in token_ends]
            values[: 1 + has_bos] = [math.nan] * min(1 + has_bos, len(values))
            ends += token_ends
            logprobs += values
            offsets.append(len(ends))
        found.append(
            Tokens(
                doc_id_S=np.array(doc_ids)[kept],
                segment_S=np.array(numbers)[kept],
                n_bytes_S=np.array(lengths)[kept],
                offsets=np.array(offsets),
                ends_T=np.array(ends, np.int64),
                logprob_T=np.array(logprobs, np.float64),
            )
        )
    return found


def by_hand(tokens: list[Tokens]) -> dict[tuple[int, int], list[tuple[int, int, list[float] | None]]]:
    """The chunks of each segment that all have read: where each begins and ends, and the log-probability under each model, if scored."""
    texts = [
        {
            (int(doc_id), int(segment)): [
                (int(end), float(logprob)) for end, logprob in zip(each.ends_T[a:b], each.logprob_T[a:b], strict=True)
            ]
            for doc_id, segment, (a, b) in zip(each.doc_id_S, each.segment_S, pairwise(each.offsets), strict=True)
        }
        for each in tokens
    ]
    chunks = {}
    for key in sorted(set.intersection(*(set(text) for text in texts))):
        shared = sorted(set.intersection(*({end for end, _ in text[key] if end > 0} for text in texts)))
        chunks[key] = []
        for start, end in pairwise([0, *shared]):
            said = [sum(logprob for at, logprob in text[key] if start < at <= end or (start == at == 0)) for text in texts]
            chunks[key].append((start, end, None if any(map(math.isnan, said)) else said))
    return chunks


def mixed_by_hand(chunks, eta: float) -> list[float | None]:
    found, document, weights = [], None, []
    for (doc_id, _), pieces in chunks.items():
        for _, _, said in pieces:
            if doc_id != document:
                document, weights = doc_id, None
            if said is None:
                found.append(None)
                continue
            weights = weights or [0.0] * len(said)
            most = max(eta * weight for weight in weights)
            shares = [math.exp(eta * weight - most) for weight in weights]
            each = [math.log(share / sum(shares)) + logprob for share, logprob in zip(shares, said, strict=True) if share > 0]
            top = max(each)
            found.append(top + math.log(math.fsum(math.exp(value - top) for value in each)))
            weights = [weight + logprob for weight, logprob in zip(weights, said, strict=True)]
    return found


@given(tokens=readings())
@settings(max_examples=300, deadline=None)
def test_chunks_and_mixtures_are_those_computed_by_hand(tokens):
    chunks, expected = shared_chunks(tokens), by_hand(tokens)
    assert [(int(a), int(b)) for a, b in zip(chunks.doc_id_S, chunks.segment_S, strict=True)] == list(expected)
    flat = [piece for pieces in expected.values() for piece in pieces]
    assert chunks.ends_C.tolist() == [end for _, end, _ in flat]
    assert chunks.bytes_C.tolist() == [end - start for start, end, _ in flat]
    assert np.diff(chunks.offsets).tolist() == [len(pieces) for pieces in expected.values()]
    for c, (_, _, said) in enumerate(flat):
        if said is None:
            assert np.isnan(chunks.logprob_MC[:, c]).all()
        else:
            assert chunks.logprob_MC[:, c] == pytest.approx(said, rel=1e-12)
    for rule, eta in (("uniform", 0.0), ("bayes", 1.0)):
        by_rule = mixed_by_hand(expected, eta)
        for value, wanted in zip(mixed(chunks, rule=rule), by_rule, strict=True):
            assert math.isnan(value) if wanted is None else value == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def scored(chunks: Chunks) -> np.ndarray:
    return np.isfinite(chunks.logprob_MC[0])


@given(tokens=readings(models=1))
@settings(deadline=None)
def test_an_ensemble_of_one_model_is_that_model(tokens):
    chunks = shared_chunks(tokens)
    for rule in ("uniform", "bayes", "oracle_document", "oracle_token"):
        np.testing.assert_allclose(mixed(chunks, rule=rule), chunks.logprob_MC[0], rtol=1e-12)


@given(tokens=readings(models=1))
@settings(deadline=None)
def test_two_equal_models_change_nothing(tokens):
    one, two = (shared_chunks(tokens * times) for times in (1, 2))
    for rule in ("uniform", "bayes", "oracle_document", "oracle_token"):
        np.testing.assert_allclose(mixed(two, rule=rule), one.logprob_MC[0], rtol=1e-12, atol=1e-14)  # log 2 and back


@given(tokens=readings())
@settings(deadline=None)
def test_bounds(tokens):
    """The Bayesian mixture costs at most log M per document more than the best model; bounds are what they are called."""
    chunks = shared_chunks(tokens)
    keep_C = scored(chunks)
    said = {rule: mixed(chunks, rule=rule)[keep_C] for rule in ("uniform", "bayes", "oracle_document", "oracle_token")}
    logprob_MC, doc_id_C = chunks.logprob_MC[:, keep_C], chunks.doc_id_C[keep_C]
    for doc_id in np.unique(doc_id_C):
        here_C = doc_id_C == doc_id
        best = logprob_MC[:, here_C].sum(axis=1).max()
        slack = 1e-9 * max(1, abs(best))
        assert said["bayes"][here_C].sum() >= best - math.log(len(tokens)) - slack
        assert said["oracle_document"][here_C].sum() == pytest.approx(best)
        assert said["oracle_token"][here_C].sum() >= max(best, said["uniform"][here_C].sum(), said["bayes"][here_C].sum()) - slack
    assert (said["uniform"] <= logprob_MC.max(axis=0, initial=-np.inf) + 1e-9).all()
