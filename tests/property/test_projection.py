"""Projection, weighting and fusion against dictionaries in plain Python."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
from fuseline.align.alignments import AlignmentsStage
from fuseline.align.config import AlignmentConfig, FusionConfig
from fuseline.align.fusion import SEVERAL, FusionStage
from fuseline.align.maps import VocabularyMapStage
from fuseline.align.projection import Projection, SourcePart, VocabularyMap, mix, project
from fuseline.align.sources import FusionSource
from fuseline.store.dataset import Dataset, PartContent
from fuseline.store.tokenizer import Tokenizer
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
        gold_logprobs = [math.nan if u in last else max(float(np.log(p)), -20.0) for u, p in enumerate(gold_probs)]
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
        ahead_T=np.array(ahead, np.uint16),
    )
    return part, [token.encode() for token in vocabulary]


class Oracle:
    """One source's projection in dictionaries."""

    def __init__(self, source: SourcePart, token_bytes: list[bytes], gold: np.ndarray, *, anchor: bool) -> None:
        self.source, self.token_bytes, self.gold, self.anchor = source, token_bytes, gold, anchor

    def entries(self, u: int, *, anchor: bool) -> dict[int, float]:
        source = self.source
        found = {int(v): float(p) for v, p in zip(source.topk_ids_UK[u], source.topk_probs_UK[u], strict=True)}
        if anchor and not math.isnan(source.gold_logprob_U[u]):
            found[int(source.gold_ids_U[u])] = math.exp(source.gold_logprob_U[u])
        return found

    def beginning(self, u: int, ahead: int, *, anchor: bool) -> dict[int, float]:
        """Entries that begin with the first bytes of the text's next token."""
        read = self.token_bytes[self.source.gold_ids_U[u]][:ahead]
        return {v: p for v, p in self.entries(u, anchor=anchor).items() if self.token_bytes[v].startswith(read) and len(read) == ahead}

    def alive(self, t: int) -> dict[int, float]:
        """Entries that agree with what the target has read, not normalised."""
        u, ahead = int(self.source.position_T[t]), int(self.source.ahead_T[t])
        if ahead == 0:
            return self.entries(u, anchor=self.anchor)
        if t > 0 and self.source.position_T[t - 1] == u and sum(self.alive(t - 1).values()) > 0:
            next_one = int(self.source.gold_ids_U[u])
            return {v: p for v, p in self.alive(t - 1).items() if v == next_one or self.mapped(v, t - 1) == self.gold[t - 1]}
        return self.beginning(u, ahead, anchor=self.anchor)

    def mapped(self, v: int, t: int) -> int:
        ahead, vocabulary = int(self.source.ahead_T[t]), self.source.vocabulary
        if ahead == 0:
            return int(vocabulary.target_ids_V[v])
        return int(vocabulary.rest_ids_B[vocabulary.offsets_V1[v] + ahead]) if ahead < len(self.token_bytes[v]) else -1

    def along(self, t: int) -> float | None:
        """Probability of the text from source position to source position, where the target's next token ends beyond this one's next."""
        here, there = int(self.source.position_T[t]), int(self.source.position_T[t + 1])
        if there == here:
            return None
        total = 1.0 if self.source.ahead_T[t] == 0 else sum(self.alive(t).values())
        through = math.prod(math.exp(self.source.gold_logprob_U[u]) for u in range(here, there)) / total
        ahead = int(self.source.ahead_T[t + 1])
        return through * (sum(self.beginning(there, ahead, anchor=True).values()) if ahead else 1.0)

    def at(self, t: int) -> tuple[dict[int, float], float, float] | None:
        """Mass of each target token, lost mass and tail; None where the source says nothing."""
        u = int(self.source.position_T[t])
        if u < 0:
            return None
        alive = self.alive(t)
        total = 1.0 if self.source.ahead_T[t] == 0 else sum(alive.values())
        if total <= 0:
            return None
        mass: dict[int, float] = {}
        lost = 0.0
        is_anchored = self.anchor and self.gold[t] >= 0 and self.source.position_T[t + 1] >= u
        for v, p in alive.items():
            share = p / total
            if is_anchored and v == self.source.gold_ids_U[u]:
                along = self.along(t)
                on_gold = share if along is None else min(along, share)
                mass[int(self.gold[t])] = mass.get(int(self.gold[t]), 0) + on_gold
                share -= on_gold
            token = self.mapped(v, t)
            if token < 0:
                lost += share
            else:
                mass[token] = mass.get(token, 0) + share
        return mass, lost, max(0.0, 1 - sum(alive.values()) / total)


def found_at(projection: Projection, t: int) -> dict[int, float]:
    n = projection.n_T[t]
    found = dict(zip(projection.ids_TC[t, :n].tolist(), projection.probs_TC[t, :n].tolist(), strict=True))
    assert len(found) == n, "a token twice"
    return found


def without_nothing(mass: dict[int, float]) -> dict[int, float]:
    return {token: p for token, p in mass.items() if p > 1e-9}


@quick
@given(case=cases(), anchor=st.booleans())
def test_every_mass_is_where_a_dictionary_has_it(case, anchor):
    for source, token_bytes in zip(case.sources, case.token_bytes, strict=True):
        projection = project(source, gold_ids_T=case.gold, gold_anchor=anchor)
        oracle = Oracle(source, token_bytes, case.gold, anchor=anchor)
        for t in range(len(case.gold)):
            expected = oracle.at(t)
            assert projection.is_aligned_T[t] == (expected is not None)
            if expected is None:
                assert (projection.n_T[t], math.isnan(projection.gold_logprob_T[t])) == (0, True)
                continue
            mass, lost, tail = expected
            assert without_nothing(found_at(projection, t)) == pytest.approx(without_nothing(mass), rel=1e-5, abs=1e-7)
            assert (projection.lost_T[t], projection.tail_T[t]) == pytest.approx((lost, tail), abs=1e-6)
            if case.gold[t] >= 0:
                assert math.exp(projection.gold_logprob_T[t]) == pytest.approx(mass.get(int(case.gold[t]), 0), rel=1e-5, abs=1e-7)


@quick
@given(case=cases(), anchor=st.booleans(), collisions=st.sampled_from(["sum", "first"]))
def test_what_is_mapped_merged_lost_and_not_stored_is_all_there_is(case, anchor, collisions):
    for source in case.sources:
        projection = project(source, gold_ids_T=case.gold, gold_anchor=anchor, collisions=collisions)
        kept = np.array([sum(found_at(projection, t).values()) for t in range(len(case.gold))])
        np.testing.assert_allclose(projection.mapped_T + projection.merged_T, kept, atol=1e-5)
        total = kept + projection.lost_T + projection.tail_T
        np.testing.assert_allclose(total, projection.is_aligned_T, atol=1e-5)
        if collisions == "first":
            assert not projection.merged_T.any()


@quick
@given(case=cases())
def test_the_text_gets_no_less_than_the_source_gave_it(case):
    """From any aligned position to a later one, with aligned ones in between: the chain rule holds across tokenizations."""
    for source in case.sources:
        projection = project(source, gold_ids_T=case.gold, gold_anchor=True)
        read = source.read_logprob_U
        for t in range(len(case.gold) - 1):
            u, there = int(source.position_T[t]), int(source.position_T[t + 1])
            if min(u, there) >= 0 and case.gold[t] >= 0 and not source.ahead_T[t] and not source.ahead_T[t + 1]:
                assert projection.gold_logprob_T[t] >= read[there] - read[u] - 1e-5


@quick
@given(case=cases(), anchor=st.booleans(), k=st.integers(1, 6), data=st.data())
def test_a_mixture_is_the_sorted_weighted_sum_with_the_gold_token_kept(case, anchor, k, data):
    projections = [project(source, gold_ids_T=case.gold, gold_anchor=anchor) for source in case.sources]
    weights = [[data.draw(st.sampled_from([0.0, 0.25, 0.5])) for _ in case.gold] for _ in projections]
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


def distributions(folder, tokenizer: Tokenizer, *, name: str, keys: list, seed: int, nats: float) -> Dataset:
    """What `DistributionsStage` would store of these segments, with random numbers in place of a model's."""
    rng = np.random.default_rng(seed)
    encoded = tokenizer.encode_segments([TEXTS[key] for key in keys])
    n, offsets = len(encoded.token_ids_T), encoded.segment_offsets
    logits = rng.normal(size=(n, tokenizer.vocab_size)) * 4
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    topk = np.argsort(-logprobs, axis=1)[:, :K]
    gold = np.take_along_axis(logprobs, np.append(encoded.token_ids_T[1:], 0).astype(int)[:, None], axis=1)[:, 0]
    gold[offsets[1:] - 1] = np.nan
    content = PartContent(
        data={
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


def entries(content: PartContent, t: int) -> dict[int, float]:
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
        assert entries(content, t) == pytest.approx(expected, rel=2e-3)
        tail = 1 - sum(entries(content, t).values())
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
        given = dict(theirs[u])
        next_one = None if math.isnan(gold_U[u]) else int(source_ids_U[u + 1])
        if next_one is not None:
            given[next_one] = math.exp(gold_U[u])
        for v, p in given.items():
            if anchored and v == next_one:
                anchors += 1
                along = math.exp(gold_U[u : position_T[t + 1]].astype(float).sum())
                expected[gold] = expected.get(gold, 0) + along
                p -= along
            if mapped[v] is None:
                lost_T[t] += p
            elif p > 1e-9:
                expected[mapped[v]] = expected.get(mapped[v], 0) + p
        assert entries(content, t) == pytest.approx(expected, rel=2e-3, abs=1e-7)
    assert anchors >= 5
    lost_S = [lost_T[a:b].sum() / (b - a) for a, b in itertools.pairwise(offsets)]
    assert content.data["lost_mass_S"].tolist() == pytest.approx(lost_S, rel=1e-3, abs=1e-6)
    for t in np.flatnonzero(np.repeat(doc_id_S == 5, np.diff(offsets))):
        assert len(entries(content, t).keys() & mine[t].keys()) == K
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
        assert entries(content, t) == pytest.approx(expected, rel=2e-3, abs=1e-7)


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
