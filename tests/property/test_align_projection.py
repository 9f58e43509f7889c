"""Projection and mixing against dictionaries in plain Python."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
from fuseline.align.cover import KEPT
from fuseline.align.projection import Projection, SourcePart, VocabularyMap, mix, project
from hypothesis import given, settings
from hypothesis import strategies as st

quick = settings(max_examples=200, deadline=None)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A text in source tokens and in target tokens, segment by segment, and what the sources give it."""

    gold: np.ndarray
    sources: list[SourcePart]
    token_bytes: list[list[bytes]]  # of each source's vocabulary


@st.composite
def cases(draw):
    """Texts over two letters, cut into tokens at random; vocabulary maps that send what they like where they like."""
    n_target = draw(st.integers(1, 6))
    texts = draw(st.lists(st.text("ab", min_size=1, max_size=8), min_size=1, max_size=3))
    cuts = [draw(pieces(text)) for text in texts]
    gold = [token for cut in cuts for token in [*(draw(st.integers(0, n_target - 1)) for _ in cut[1:]), -1]]
    sources = [draw(source_parts(texts, cuts, n_target=n_target)) for _ in range(draw(st.integers(1, 3)))]
    return Case(gold=np.array(gold), sources=[part for part, _ in sources], token_bytes=[vocabulary for _, vocabulary in sources])


@st.composite
def pieces(draw, text: str):
    """The text cut into non-empty pieces."""
    inner = draw(st.sets(st.integers(1, len(text) - 1))) if len(text) > 1 else set()
    return [text[start:end] for start, end in itertools.pairwise([0, *sorted(inner), len(text)])]


@st.composite
def source_parts(draw, texts: list[str], cuts: list[list[str]], *, n_target: int):
    """A source's part that covers the target's, or only where boundaries are shared."""
    own_cuts = [draw(pieces(text)) for text in texts]
    vocabulary = sorted({piece for cut in own_cuts for piece in cut} | draw(st.sets(st.text("ab", max_size=4), max_size=6)))
    k, covers = draw(st.integers(1, min(4, len(vocabulary)))), draw(st.booleans())
    position, ahead, gold, base = [], [], [], 0
    for own, cut in zip(own_cuts, cuts, strict=True):
        ends = list(itertools.accumulate(map(len, own)))
        for end in itertools.accumulate(map(len, cut)):
            place = max((j for j, e in enumerate(ends) if e <= end), default=-1)
            is_there = place >= 0 and (covers or ends[place] == end)
            position.append(base + place if is_there else -1)
            ahead.append(end - ends[place] if is_there else 0)
        gold += [vocabulary.index(piece) for piece in own[1:]] + [0]
        base += len(own)
    last = {sum(map(len, own_cuts[: s + 1])) - 1 for s in range(len(texts))}
    # Sixteenths, so that ties and exact sums occur.
    probs = [sorted((draw(st.integers(0, 16 // (k + 1))) / 16 for _ in range(k)), reverse=True) for _ in range(base)]
    topk = [draw(st.permutations(range(len(vocabulary))))[:k] for _ in range(base)]
    gold_probs = [
        probs[u][topk[u].index(v)] if v in topk[u] else draw(st.integers(0, int(16 - 16 * sum(probs[u])))) / 16 for u, v in enumerate(gold)
    ]
    sizes = [len(token) for token in vocabulary]
    with np.errstate(divide="ignore"):
        gold_logprobs = [math.nan if u in last else max(float(np.log(p)), -8.0) for u, p in enumerate(gold_probs)]
    part = SourcePart(
        topk_ids_UK=np.array(topk, np.uint16).reshape(base, k),
        topk_probs_UK=np.array(probs, np.float32).reshape(base, k),
        gold_ids_U=np.array(gold, np.int64),
        gold_logprob_U=np.array(gold_logprobs),
        vocabulary=VocabularyMap(
            target_ids_V=np.array([draw(st.integers(-1, n_target - 1)) for _ in vocabulary], np.int32),
            rest_ids_B=np.array([draw(st.integers(-1, n_target - 1)) for _ in range(sum(sizes))], np.int32),
            buffer_B=np.frombuffer("".join(vocabulary).encode(), np.uint8),
            offsets_V1=np.cumsum([0, *sizes]),
        ),
        position_T=np.array(position, np.int32),
        ahead_T=np.array(ahead, np.uint16) if covers else None,
    )
    return part, [token.encode() for token in vocabulary]


def entries(source: SourcePart, u: int) -> dict[int, float]:
    return {int(v): float(p) for v, p in zip(source.topk_ids_UK[u], source.topk_probs_UK[u], strict=True)}


def with_next(source: SourcePart, u: int) -> dict[int, float]:
    """A position's entries, and the token that follows, which is stored apart."""
    is_known = not math.isnan(source.gold_logprob_U[u])
    return entries(source, u) | ({int(source.gold_ids_U[u]): math.exp(source.gold_logprob_U[u])} if is_known else {})


@dataclass
class At:
    """What a source says at a position: mass of each target token, and what has none."""

    mass: dict[int, float]
    lost: float
    tail: float

    def add(self, token: int, share: float) -> None:
        if token < 0:
            self.lost += share
        elif share > 0:
            self.mass[token] = self.mass.get(token, 0) + share


def at_shared_boundaries(source: SourcePart, gold: np.ndarray, *, anchor: bool) -> list[At | None]:
    """The projection of `span`, in dictionaries."""
    found = []
    for t, u in enumerate(source.position_T.tolist()):
        if u < 0:
            found.append(None)
            continue
        along = None
        if anchor and gold[t] >= 0 and source.position_T[t + 1] >= 0:
            along = math.prod(math.exp(source.gold_logprob_U[step]) for step in range(u, source.position_T[t + 1]))
        here = At({}, 0.0, 0.0)
        for v, p in entries(source, u).items():
            token = int(source.vocabulary.target_ids_V[v])
            if along is not None and v == source.gold_ids_U[u]:
                here.lost += max(0.0, p - along)
            elif along is not None and token == gold[t]:
                here.lost += p
            else:
                here.add(token, p)
        if along is not None:
            here.add(int(gold[t]), along)
        here.tail = max(0.0, 1 - here.lost - sum(here.mass.values()))
        found.append(here)
    return found


class Readings:
    """The projection of `cover`: source tokens that the text may be in the middle of, as lists of [token, bytes read, mass]."""

    def __init__(self, source: SourcePart, token_bytes: list[bytes], gold: np.ndarray) -> None:
        self.source, self.token_bytes, self.gold = source, token_bytes, gold

    def mapped(self, v: int, read: int) -> int:
        vocabulary = self.source.vocabulary
        if read == 0:
            return int(vocabulary.target_ids_V[v])
        return int(vocabulary.rest_ids_B[vocabulary.offsets_V1[v] + read]) if read < len(self.token_bytes[v]) else -1

    def beginning(self, u: int, n: int) -> dict[int, float]:
        """Entries that begin as the token that follows does."""
        begin = self.token_bytes[self.source.gold_ids_U[u]][:n]
        return {v: p for v, p in with_next(self.source, u).items() if self.token_bytes[v][:n] == begin}

    def positions(self) -> list[At | None]:
        found, others, path, boundary, ended, starts = [], [], None, 0.0, 0.0, True
        source = self.source
        for t, u in enumerate(source.position_T.tolist()):
            ahead = int(source.ahead_T[t])
            if u < 0:
                found.append(None)
                starts = True
                continue
            next_one = int(source.gold_ids_U[u])
            if starts:
                others, path, boundary, ended = [], None, float(ahead == 0), 0.0
                if ahead:
                    begun = self.beginning(u, ahead)
                    total = sum(begun.values())
                    others = [[v, ahead, p / total] for v, p in begun.items() if v != next_one]
                    path = [next_one, ahead, begun[next_one] / total]
            here = At({}, ended, 0.0)
            if ahead == 0:
                given = with_next(source, u)
                others += [[v, 0, boundary * p] for v, p in given.items() if v != next_one or math.isnan(source.gold_logprob_U[u])]
                path = None if math.isnan(source.gold_logprob_U[u]) else [next_one, 0, boundary * given[next_one]]
                here.tail = max(0.0, boundary * (1 - sum(given.values())))
            found.append(here)
            for v, read, share in others:
                here.add(self.mapped(v, read), share)
            starts = self.gold[t] < 0 or path is None
            if starts:
                assert path is None
                continue
            gold, there, beyond = int(self.gold[t]), int(source.position_T[t + 1]), int(source.ahead_T[t + 1])
            chain = path[2] * math.prod(math.exp(source.gold_logprob_U[step]) for step in range(u + 1, there))
            begun = self.beginning(there, beyond) if there > u and beyond else {}
            along = chain * min(1.0, sum(begun.values()) or 1.0)
            here.add(gold, along)
            if path[2] > along:
                here.add(self.mapped(path[0], path[1]), path[2] - along)
            n_read = beyond - ahead + sum(len(self.token_bytes[source.gold_ids_U[step]]) for step in range(u, there))
            said_so = [[v, read + n_read, share] for v, read, share in others if self.mapped(v, read) == gold]
            total = along + sum(share for *_, share in said_so)
            inside = [reading for reading in said_so if reading[1] < len(self.token_bytes[reading[0]])]
            kept = inside[:KEPT]
            over = [reading for reading in said_so if reading not in kept]
            boundary = sum(share for v, read, share in over if read == len(self.token_bytes[v]) and beyond == 0)
            ended = sum(share for *_, share in over) - boundary
            if there == u:
                path = [path[0], beyond, path[2]]
            elif beyond == 0:
                boundary, path = boundary + along, None
            else:
                scale = along / sum(begun.values())
                kept += [[v, beyond, scale * p] for v, p in begun.items() if v != source.gold_ids_U[there]]
                path = [int(source.gold_ids_U[there]), beyond, scale * begun[int(source.gold_ids_U[there])]]
            others = [[v, read, share / total] for v, read, share in kept]
            path = path and [path[0], path[1], path[2] / total]
            boundary, ended = boundary / total, ended / total
        return found


def expected_of(source: SourcePart, token_bytes: list[bytes], gold: np.ndarray, *, anchor: bool) -> list[At | None]:
    if source.ahead_T is None:
        return at_shared_boundaries(source, gold, anchor=anchor)
    return Readings(source, token_bytes, gold).positions()


def found_at(projection: Projection, t: int) -> dict[int, float]:
    n = projection.n_T[t]
    found = dict(zip(projection.ids_TC[t, :n].tolist(), projection.probs_TC[t, :n].tolist(), strict=True))
    assert len(found) == n, "a token twice"
    return found


def without_nothing(mass: dict[int, float]) -> dict[int, float]:
    return {token: p for token, p in mass.items() if p > 1e-9}


@settings(max_examples=600, deadline=None)
@given(case=cases(), anchor=st.booleans())
def test_every_mass_is_where_a_dictionary_has_it(case, anchor):
    for source, token_bytes in zip(case.sources, case.token_bytes, strict=True):
        projection = project(source, gold_ids_T=case.gold, gold_anchor=anchor or source.ahead_T is not None)
        for t, expected in enumerate(expected_of(source, token_bytes, case.gold, anchor=anchor)):
            assert projection.is_aligned_T[t] == (expected is not None)
            if expected is None:
                assert (projection.n_T[t], math.isnan(projection.gold_logprob_T[t])) == (0, True)
                continue
            assert without_nothing(found_at(projection, t)) == pytest.approx(without_nothing(expected.mass), rel=1e-5, abs=1e-6)
            assert (projection.lost_T[t], projection.tail_T[t]) == pytest.approx((expected.lost, expected.tail), abs=1e-6)
            if case.gold[t] >= 0:
                assert math.exp(projection.gold_logprob_T[t]) == pytest.approx(expected.mass.get(int(case.gold[t]), 0), rel=1e-5, abs=1e-6)


@quick
@given(case=cases(), anchor=st.booleans(), collisions=st.sampled_from(["sum", "first"]))
def test_what_is_mapped_merged_lost_and_not_stored_is_all_there_is(case, anchor, collisions):
    for source in case.sources:
        if source.ahead_T is not None:  # which the recipe refuses otherwise
            anchor, collisions = True, "sum"
        projection = project(source, gold_ids_T=case.gold, gold_anchor=anchor, collisions=collisions)
        kept = np.array([sum(found_at(projection, t).values()) for t in range(len(case.gold))])
        np.testing.assert_allclose(projection.mapped_T + projection.merged_T, kept, atol=1e-5)
        total = kept + projection.lost_T + projection.tail_T
        np.testing.assert_allclose(total, projection.is_aligned_T, atol=1e-5)
        if collisions == "first":
            assert not projection.merged_T.any()


@settings(max_examples=1000, deadline=None)
@given(case=cases())
def test_cover_gives_the_text_no_less_than_the_source_did(case):
    """From the first position of a segment at which the source speaks to the segment's end: the chain rule across tokenizations."""
    for source in case.sources:
        if source.ahead_T is None:
            continue
        projection = project(source, gold_ids_T=case.gold, gold_anchor=True)
        first, given = None, 0.0
        for t in range(len(case.gold)):
            if projection.is_aligned_T[t] and first is None:
                first, given = t, 0.0
            if case.gold[t] >= 0 and first is not None:
                given += float(projection.gold_logprob_T[t])
            elif first is not None:
                ends = source.read_logprob_U[source.position_T[[first, t]]]
                assert given >= ends[1] - ends[0] - 1e-4
                first = None


@quick
@given(case=cases())
def test_the_anchor_of_span_is_exactly_the_sources_probability_of_the_text(case):
    for source in case.sources:
        if source.ahead_T is None:
            found_T = project(source, gold_ids_T=case.gold, gold_anchor=True).gold_logprob_T
            for t in np.flatnonzero((case.gold >= 0) & (source.position_T >= 0)):
                if source.position_T[t + 1] >= 0:
                    ends = source.read_logprob_U[source.position_T[t : t + 2]]
                    assert found_T[t] == pytest.approx(ends[1] - ends[0], rel=1e-5, abs=1e-6)


@quick
@given(case=cases(), anchor=st.booleans(), k=st.integers(1, 6), data=st.data())
def test_a_mixture_is_the_sorted_weighted_sum_with_the_gold_token_kept(case, anchor, k, data):
    projections = [project(source, gold_ids_T=case.gold, gold_anchor=anchor or source.ahead_T is not None) for source in case.sources]
    weights = [[data.draw(st.sampled_from([0.0, 0.25, 0.5])) for _ in case.gold] for _ in projections]
    for t in range(len(case.gold)):
        only = data.draw(st.none() | st.integers(0, len(projections) - 1))
        if only is not None:
            for source, weight_T in enumerate(weights):
                weight_T[t] = float(source == only)
    ids_TK, probs_TK, tail_T = mix(projections, weights_NT=np.array(weights), top_k=k, gold_ids_T=case.gold)
    for t, gold in enumerate(case.gold.tolist()):
        mass: dict[int, float] = {}
        for projection, weight_T in zip(projections, weights, strict=True):
            for token, prob in found_at(projection, t).items():
                mass[token] = mass.get(token, 0) + weight_T[t] * prob
        ranked = sorted(((-prob, token) for token, prob in mass.items() if prob > 0))
        expected = [(token, -prob) for prob, token in ranked[:k]]
        if mass.get(gold, 0) > 0 and gold not in dict(expected):
            expected[-1] = (gold, mass[gold])
        n = len(expected)
        assert ids_TK[t, :n].tolist() == [token for token, _ in expected]
        assert probs_TK[t, :n].tolist() == [prob for _, prob in expected]
        assert not probs_TK[t, n:].any()
        assert tail_T[t] == pytest.approx(max(0, 1 - sum(prob for _, prob in expected)), abs=1e-12)


def test_an_id_beyond_the_map_is_lost_and_the_identity_maps_everything():
    """A model may have more logits than its tokenizer has tokens."""
    part = {
        "topk_ids_UK": np.array([[5, 0]], np.uint16), "topk_probs_UK": np.array([[0.5, 0.25]], np.float32),
        "gold_ids_U": np.array([0]), "gold_logprob_U": np.array([math.nan]), "position_T": np.array([0], np.int32),
    }  # fmt: skip
    gold = np.array([-1])
    three = VocabularyMap.of_tokens(np.array([3], np.int32))
    beyond = project(SourcePart(**part, vocabulary=three), gold_ids_T=gold, gold_anchor=True)
    assert (found_at(beyond, 0), beyond.lost_T[0], beyond.tail_T[0]) == ({3: 0.25}, 0.5, 0.25)
    identity = project(SourcePart(**part, vocabulary=None), gold_ids_T=gold, gold_anchor=True)
    assert (found_at(identity, 0), identity.lost_T[0]) == ({5: 0.5, 0: 0.25}, 0)
