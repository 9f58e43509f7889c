"""Projection, weighting and fusion against dictionaries in plain Python."""

import itertools
import math
import unicodedata
from dataclasses import dataclass

import numpy as np
import pytest
from fuseline.align.alignments import AlignmentsStage
from fuseline.align.config import AlignmentConfig, FusionConfig
from fuseline.align.cover import KEPT
from fuseline.align.fusion import FusionStage
from fuseline.align.maps import VocabularyMapStage
from fuseline.align.projection import Projection, SourcePart, VocabularyMap, mix, project
from fuseline.align.sources import FusionSource, gold_ids
from fuseline.store.dataset import Dataset, PartContent
from fuseline.store.targets import SEVERAL
from fuseline.store.tokenizer import Tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import train_composing

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


# From here on whole stages, on datasets made by hand.

TEXTS = {(3, 0): "def f(x): return x", (3, 1): "\n  unbelievably, 1234 words", (5, 0): "naïve 漢字 text", (8, 0): "a"}
K = 4


def distributions(folder, tokenizer: Tokenizer, *, name: str, keys: list, seed: int, nats: float, texts: dict | None = None) -> Dataset:
    """What `DistributionsStage` would store of these segments, with random numbers in place of a model's."""
    rng = np.random.default_rng(seed)
    encoded = tokenizer.encode_segments([(texts or TEXTS)[key] for key in keys])
    n, offsets = len(encoded.token_ids_T), encoded.segment_offsets
    logits = rng.normal(size=(n, tokenizer.vocab_size)) * 4
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    topk = np.argsort(-logprobs, axis=1)[:, :K]
    gold = np.take_along_axis(logprobs, np.append(encoded.token_ids_T[1:], 0).astype(int)[:, None], axis=1)[:, 0]
    gold[offsets[1:] - 1] = np.nan
    rewritten = {} if encoded.byte_ends_T is None else {"byte_ends_T": encoded.byte_ends_T}
    content = PartContent(
        data=rewritten
        | {
            "token_ids_T": encoded.token_ids_T,
            "segment_offsets": offsets,
            "doc_id_S": np.array([doc for doc, _ in keys]),
            "segment_S": np.array([segment for _, segment in keys], np.uint32),
            "n_bytes_S": encoded.n_bytes_S.astype(np.uint32),
            "nll_S": np.full(len(keys), nats),
            "n_scored_S": np.diff(offsets).astype(np.uint32),
            "scored_bytes_S": encoded.n_bytes_S.astype(np.uint32),
            "gold_logprob_T": gold.astype(np.float16),
            "topk_ids_TK": topk.astype(np.uint16),
            "topk_logprobs_TK": np.take_along_axis(logprobs, topk, axis=1).astype(np.float16),
        },
        counts={},
    )
    dataset = Dataset.create(folder / "distributions" / name, identity={"name": name})
    dataset.commit(0, content=content, seconds=0)
    return dataset


def stored(folder, kind: str, content: PartContent) -> Dataset:
    dataset = Dataset.create(folder / kind, identity={"kind": kind})
    dataset.commit(0, content=content, seconds=0)
    return dataset


@pytest.fixture
def two(tmp_path, byte_level_folder, sentencepiece_folder):
    """The target's own start (byte-level) and an aligned source (SentencePiece) that has no document 5 and is better."""
    target, source = Tokenizer.from_model_folder(byte_level_folder), Tokenizer.from_model_folder(sentencepiece_folder)
    target.save(tmp_path / "tokenizers" / "target")
    source.save(tmp_path / "tokenizers" / "source")
    own = distributions(tmp_path, target, name="target", keys=list(TEXTS), seed=1, nats=9.0)
    other = distributions(tmp_path, source, name="source", keys=[key for key in TEXTS if key[0] != 5], seed=2, nats=3.0)
    stage = AlignmentsStage(
        own, source=other, target=own, rule="span",
        source_tokenizer_folder=tmp_path / "tokenizers" / "source", target_tokenizer_folder=tmp_path / "tokenizers" / "target",
    )  # fmt: skip
    alignment = stored(tmp_path, "alignments", stage.compute(0))
    maps = stored(tmp_path, "vocab_maps", VocabularyMapStage(own, source=source, target=target, rule="prefix").compute(0))
    return FusionSource(name="target", distributions=own), FusionSource(
        name="source", distributions=other, alignment=alignment, vocabulary_map=maps
    )


def fused(sources, *, anchor: bool = True, top_k: int = K, **config) -> PartContent:
    return FusionStage(
        sources[0].distributions, sources=list(sources), alignment=AlignmentConfig(positions="span", gold_anchor=anchor),
        fusion=FusionConfig(**config), top_k=top_k,
    ).compute(0)  # fmt: skip


def own_distributions(source: FusionSource) -> list[dict[int, float]]:
    ids_TK, logprobs_TK = source.distributions.read(0, "topk_ids_TK", "topk_logprobs_TK")
    return [
        {int(v): math.exp(p) for v, p in zip(ids_K, logprobs_K, strict=True)} for ids_K, logprobs_K in zip(ids_TK, logprobs_TK, strict=True)
    ]


def fused_entries(content: PartContent, t: int) -> dict[int, float]:
    pairs = zip(content.data["topk_ids_TK"][t].tolist(), content.data["topk_logprobs_TK"][t].tolist(), strict=True)
    return {token: math.exp(logprob) for token, logprob in pairs if logprob > -math.inf}


@pytest.mark.parametrize("method", ["mince", "avgce"])
def test_the_targets_own_start_alone_gives_back_its_distributions_and_the_gold_token(two, method):
    own = two[0]
    content = fused([own], method=method)
    token_ids_T, gold_T, offsets = own.distributions.read(0, "token_ids_T", "gold_logprob_T", "segment_offsets")
    added_gold = 0
    for t, expected in enumerate(own_distributions(own)):
        if not math.isnan(gold_T[t]):
            gold = int(token_ids_T[t + 1])
            if gold not in expected:
                del expected[min(expected, key=expected.get)]
                added_gold += 1
            expected[gold] = math.exp(gold_T[t])
        assert fused_entries(content, t) == pytest.approx(expected, rel=2e-3)
        tail = 1 - sum(fused_entries(content, t).values())
        assert math.exp(content.data["tail_logprob_T"][t]) == pytest.approx(tail, abs=2e-3)
    assert added_gold > len(token_ids_T) / 2, "the case is too easy"
    assert not content.data["source_T"].any()
    assert content.counts == {"segments": 4, "tokens": len(token_ids_T), "from_target": len(token_ids_T)}
    assert content.data["segment_offsets"].tolist() == offsets.tolist()
    assert content.data["lost_mass_S"].max() < 1e-6


def test_without_anchor_the_targets_own_start_alone_is_unchanged_to_the_bit(two):
    own = two[0]
    content = fused([own], anchor=False)
    ids_TK, logprobs_TK = own.distributions.read(0, "topk_ids_TK", "topk_logprobs_TK")
    assert {len(set(row)) for row in logprobs_TK.tolist()} == {K}, "ties would be put in another order"
    np.testing.assert_array_equal(content.data["topk_ids_TK"], ids_TK)
    np.testing.assert_array_equal(content.data["topk_logprobs_TK"].astype(np.float16), logprobs_TK)


def test_alignments_cover_each_segment_as_counted_and_leave_out_what_the_source_left_out(two):
    own, other = two
    position_T, n_S, aligned_S = other.alignment.read(0, "source_position_T", "n_positions_S", "n_aligned_S")
    offsets, doc_id_S = own.distributions.read(0, "segment_offsets", "doc_id_S")
    assert n_S.tolist() == np.diff(offsets).tolist()
    assert aligned_S.tolist() == [sum(u >= 0 for u in position_T[a:b]) for a, b in itertools.pairwise(offsets)]
    assert aligned_S[doc_id_S == 5].tolist() == [0]
    assert (aligned_S[doc_id_S != 5] >= 1).all()  # at least the end of the text is shared
    assert other.alignment.manifest(0).counts == {"segments": 4, "tokens": len(position_T), "aligned": int((position_T >= 0).sum())}


def test_mince_takes_the_better_source_where_it_is_aligned_and_the_targets_own_start_elsewhere(two):
    own, other = two
    content = fused(two, method="mince", top_k=6)
    (position_T,) = other.alignment.read(0, "source_position_T")
    doc_id_S, offsets, token_ids_T = own.distributions.read(0, "doc_id_S", "segment_offsets", "token_ids_T")
    source_ids_U, gold_U = other.distributions.read(0, "token_ids_T", "gold_logprob_T")
    mapped = other.vocabulary_map.table(0)["target_id"].to_list()
    assert content.data["source_T"].tolist() == [int(u >= 0) for u in position_T]
    assert content.data["source_S"].tolist() == [int(doc != 5) for doc in doc_id_S]
    ends = set(offsets[1:].tolist())
    theirs, mine = own_distributions(other), own_distributions(own)
    lost_T = np.zeros(len(position_T))
    anchors = 0
    for t, u in enumerate(position_T.tolist()):
        if u == -1:
            continue
        gold = -1 if t + 1 in ends else int(token_ids_T[t + 1])
        anchored = gold >= 0 and position_T[t + 1] >= 0
        expected: dict[int, float] = {}
        for v, p in theirs[u].items():
            if anchored and v == source_ids_U[u + 1]:
                lost_T[t] += max(0.0, p - math.exp(gold_U[u : position_T[t + 1]].astype(float).sum()))
                continue
            if mapped[v] is None or (anchored and mapped[v] == gold):
                lost_T[t] += p
            else:
                expected[mapped[v]] = expected.get(mapped[v], 0) + p
        if anchored:
            anchors += 1
            expected[gold] = math.exp(gold_U[u : position_T[t + 1]].astype(float).sum())
        assert fused_entries(content, t) == pytest.approx(expected, rel=2e-3, abs=1e-7)
    assert anchors >= 5
    lost_S = [lost_T[a:b].sum() / (b - a) for a, b in itertools.pairwise(offsets)]
    assert content.data["lost_mass_S"].tolist() == pytest.approx(lost_S, rel=1e-3, abs=1e-6)
    for t in np.flatnonzero(np.repeat(doc_id_S == 5, np.diff(offsets))):
        assert len(fused_entries(content, t).keys() & mine[t].keys()) == K
    assert content.counts["from_source"] == sum(u >= 0 for u in position_T)


def test_avgce_weighs_the_sources_and_gives_a_segment_missing_in_one_to_the_other(two):
    content = fused(two, method="avgce", anchor=False, top_k=2 * K)
    own, other = two
    (position_T,) = other.alignment.read(0, "source_position_T")
    offsets, scored_bytes_S = own.distributions.read(0, "segment_offsets", "scored_bytes_S")
    segment_T = np.repeat(np.arange(len(TEXTS)), np.diff(offsets))
    mapped = other.vocabulary_map.table(0)["target_id"].to_list()
    mine, theirs = own_distributions(own), own_distributions(other)
    assert content.data["source_T"].tolist() == [SEVERAL if u >= 0 else 0 for u in position_T]
    assert content.data["source_S"].tolist() == [0 if doc == 5 else SEVERAL for doc, _ in TEXTS]
    for t, u in enumerate(position_T.tolist()):
        expected = dict(mine[t])
        if u >= 0:
            n_bytes = int(scored_bytes_S[segment_T[t]])
            scores = [math.exp(math.exp(-nats / math.log(2) / n_bytes)) for nats in (9.0, 3.0)]
            weights = [score / sum(scores) for score in scores]
            expected = {v: p * weights[0] for v, p in mine[t].items()}
            for v, p in theirs[u].items():
                if mapped[v] is not None:
                    expected[mapped[v]] = expected.get(mapped[v], 0) + p * weights[1]
        assert fused_entries(content, t) == pytest.approx(expected, rel=2e-3, abs=1e-7)


def test_a_part_of_which_the_target_left_everything_out_is_empty_and_not_an_error(two, tmp_path):
    names = ("token_ids_T", "segment_offsets", "doc_id_S", "segment_S", "n_bytes_S", "nll_S", "n_scored_S", "scored_bytes_S",
             "gold_logprob_T", "topk_ids_TK", "topk_logprobs_TK")  # fmt: skip
    own, other = two
    arrays = dict(zip(names, own.distributions.read(0, *names), strict=True))
    empty = {name: array[:0] for name, array in arrays.items()} | {"segment_offsets": np.zeros(1, np.int64)}
    nothing = Dataset.create(tmp_path / "distributions" / "nothing", identity={"name": "nothing"})
    nothing.commit(0, content=PartContent(data=empty, counts={}), seconds=0)
    folders = {f"{side}_tokenizer_folder": tmp_path / "tokenizers" / side for side in ("source", "target")}
    content = AlignmentsStage(own.distributions, source=other.distributions, target=nothing, rule="span", **folders).compute(0)
    assert content.counts == {"segments": 0, "tokens": 0, "aligned": 0}
    aligned = stored(tmp_path, "alignments-of-nothing", content)
    sources = [
        FusionSource(name="target", distributions=nothing),
        FusionSource(name="source", distributions=other.distributions, alignment=aligned, vocabulary_map=other.vocabulary_map),
    ]
    assert fused(sources).counts == {"segments": 0, "tokens": 0, "from_target": 0, "from_source": 0}


@pytest.fixture
def covered(two, tmp_path):
    """The same, with `cover`."""
    own, other = two
    stage = AlignmentsStage(
        own.distributions, source=other.distributions, target=own.distributions, rule="cover",
        source_tokenizer_folder=tmp_path / "tokenizers" / "source", target_tokenizer_folder=tmp_path / "tokenizers" / "target",
    )  # fmt: skip
    alignment = Dataset.create(tmp_path / "covering" / "alignments", identity={})
    alignment.commit(0, content=stage.compute(0), seconds=0)
    return own, FusionSource(name="source", distributions=other.distributions, alignment=alignment, vocabulary_map=other.vocabulary_map)


def test_under_cover_a_source_speaks_wherever_it_has_read_something_and_gives_the_text_what_it_gave_it(covered):
    own, other = covered
    content = FusionStage(
        own.distributions, sources=[own, other], alignment=AlignmentConfig(), fusion=FusionConfig(method="mince"), top_k=40
    ).compute(0)
    position_T, ahead_T = other.alignment.read(0, "source_position_T", "ahead_T")
    doc_id_S, offsets, token_ids_T = own.distributions.read(0, "doc_id_S", "segment_offsets", "token_ids_T")
    source_offsets, source_doc_id_S, source_segment_S, gold_U = other.distributions.read(
        0, "segment_offsets", "doc_id_S", "segment_S", "gold_logprob_T"
    )
    is_theirs_T = np.repeat(doc_id_S != 5, np.diff(offsets))
    assert (position_T >= 0).tolist() == is_theirs_T.tolist() == content.data["source_T"].astype(bool).tolist()
    assert (ahead_T > 0).any(), "the case does not arise"
    places = {key: s for s, key in enumerate(zip(source_doc_id_S.tolist(), source_segment_S.tolist(), strict=True))}
    for s, key in enumerate(TEXTS):
        if key not in places:
            continue
        start, end = offsets[s : s + 2]
        given = sum(math.log(fused_entries(content, t)[int(token_ids_T[t + 1])]) for t in range(start, end - 1))
        last = source_offsets[places[key] + 1] - 1
        assert given >= gold_U[position_T[start] : last].astype(float).sum() - 0.05


# What Qwen's tokenizer composes: Vietnamese and Korean in parts, and letters before and after.
DECOMPOSED = {
    (0, 0): "zzx" + unicodedata.normalize("NFD", "각각 tiếng Việt"), (1, 0): "plain", (2, 0): "e\u0301e\u0301\u0323 unbelievable \u212b▁",
}  # fmt: skip


@pytest.mark.parametrize("composes", ["source", "target", "both"])
def test_cover_speaks_also_of_text_that_a_tokenizer_rewrote(tmp_path, corpus_texts, byte_level_folder, sentencepiece_folder, composes):
    composing = Tokenizer.from_model_folder(train_composing(tmp_path / "composing", texts=corpus_texts))
    sides = {"source": Tokenizer.from_model_folder(sentencepiece_folder), "target": Tokenizer.from_model_folder(byte_level_folder)}
    sides |= {side: composing for side in sides if composes in (side, "both")}
    keys = list(DECOMPOSED)
    datasets = {
        side: distributions(tmp_path, tokenizer, name=side, keys=keys, seed=len(side), nats=1.0 + len(side), texts=DECOMPOSED)
        for side, tokenizer in sides.items()
    }
    for side, tokenizer in sides.items():
        tokenizer.save(tmp_path / "tokenizers" / side)
    stage = AlignmentsStage(
        datasets["target"], **datasets, rule="cover",
        source_tokenizer_folder=tmp_path / "tokenizers" / "source", target_tokenizer_folder=tmp_path / "tokenizers" / "target",
    )  # fmt: skip
    alignment = stored(tmp_path, "alignments", stage.compute(0))
    maps = stored(
        tmp_path, "vocab_maps", VocabularyMapStage(alignment, source=sides["source"], target=sides["target"], rule="prefix").compute(0)
    )
    source = FusionSource(name="source", distributions=datasets["source"], alignment=alignment, vocabulary_map=maps)
    token_ids_T, offsets = datasets["target"].read(0, "token_ids_T", "segment_offsets")
    projection = source.project(0, gold_ids_T=gold_ids(token_ids_T, offsets=offsets), gold_anchor=True)
    total_T = projection.mapped_T + projection.merged_T + projection.lost_T + projection.tail_T
    np.testing.assert_allclose(total_T, projection.is_aligned_T, atol=2e-3)
    assert projection.is_aligned_T.mean() > 0.2
    (position_T, ahead_T), (ids_U,) = alignment.read(0, "source_position_T", "ahead_T"), datasets["source"].read(0, "token_ids_T")
    lengths_V = sides["source"].token_bytes.lengths_V
    assert all(ahead < lengths_V[ids_U[u + 1]] for u, ahead in zip(position_T, ahead_T, strict=True) if ahead)
