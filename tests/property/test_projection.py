"""Projection, weighting and fusion against dictionaries in plain Python."""

import itertools
import math

import numpy as np
import pytest
from fuseline.align.alignments import AlignmentsStage
from fuseline.align.config import AlignmentConfig, FusionConfig
from fuseline.align.fusion import SEVERAL, FusionSource, FusionStage, segment_costs, source_weights
from fuseline.align.maps import VocabularyMapStage
from fuseline.align.projection import Mixture, SourcePart, gold_probabilities
from fuseline.store.dataset import Dataset, PartContent
from fuseline.store.tokenizer import Tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

quick = settings(max_examples=200, deadline=None)


@st.composite
def target_parts(draw):
    """The token that follows each position of a target part, -1 at the last of a segment."""
    vocab = draw(st.integers(1, 8))
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    gold = [token for n in lengths for token in [*draw(st.lists(ids(vocab), min_size=n - 1, max_size=n - 1)), -1]]
    return vocab, lengths, gold


def ids(vocab: int):
    return st.integers(0, vocab - 1)


@st.composite
def source_parts(draw, target_vocab: int, lengths: list[int]):
    """A source's part with its maps: strictly rising positions, segment by segment, and distinct entries of each distribution."""
    vocab, k = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    k = min(k, vocab)
    position, segments, n = [], [], 0
    for length in lengths:
        size = draw(st.integers(0, 6))
        places = sorted(draw(st.sets(st.integers(0, size - 1), max_size=min(size, length)))) if size else []
        at = sorted(draw(st.permutations(range(length)))[: len(places)])
        of = dict(zip(at, places, strict=True))
        position += [n + of[t] if t in of else -1 for t in range(length)]
        segments.append(range(n, n + size))
        n += size
    topk = [draw(st.permutations(range(vocab)))[:k] for _ in range(n)]
    # eighths, so that ties and exact sums occur
    probs = [sorted((draw(st.integers(0, 8 // k)) / 8 for _ in range(k)), reverse=True) for _ in range(n)]
    last = {segment[-1] for segment in segments if segment}
    return SourcePart(
        topk_ids_UK=np.array(topk, np.uint16).reshape(n, k),
        topk_probs_UK=np.array(probs, np.float32).reshape(n, k),
        gold_ids_U=np.array([draw(ids(vocab)) for _ in range(n)], np.int64),
        gold_logprob_U=np.array([math.nan if u in last else -draw(st.integers(0, 4)) * math.log(2) for u in range(n)], np.float64),
        target_ids_V=np.array([draw(st.integers(-1, target_vocab - 1)) for _ in range(vocab)], np.int32),
        position_T=np.array(position, np.int32),
    )


@st.composite
def mixtures(draw):
    vocab, lengths, gold = draw(target_parts())
    sources = draw(st.lists(source_parts(vocab, lengths), min_size=1, max_size=3))
    weights = [[draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])) for _ in gold] for _ in sources]
    return np.array(gold), sources, np.array(weights)


def probability_of_gold(source: SourcePart, gold: np.ndarray, t: int) -> float | None:
    """Product of the source's gold probabilities from this target position's source position to the next one's, if both have one."""
    if gold[t] == -1 or source.position_T[t] < 0 or source.position_T[t + 1] < 0:
        return None
    return math.prod(math.exp(source.gold_logprob_U[u]) for u in range(source.position_T[t], source.position_T[t + 1]))


def mix(gold: np.ndarray, sources: list[SourcePart], weights: np.ndarray, *, anchor: bool) -> list[tuple[dict[int, float], float]]:
    """For each position the mass of every token, and the mass that was lost."""
    mixed = []
    for t in range(len(gold)):
        mass: dict[int, float] = {}
        lost = 0.0
        for source, weight_T in zip(sources, weights, strict=True):
            u = source.position_T[t]
            if u < 0 or weight_T[t] == 0:
                continue
            anchored = probability_of_gold(source, gold, t) if anchor else None
            for source_id, prob in zip(source.topk_ids_UK[u], source.topk_probs_UK[u], strict=True):
                token = int(source.target_ids_V[source_id])
                if anchored is not None and source_id == source.gold_ids_U[u]:
                    lost += weight_T[t] * max(0.0, float(prob) - anchored)
                    continue
                if token == -1 or (anchored is not None and token == gold[t]):
                    lost += weight_T[t] * float(prob)
                else:
                    mass[token] = mass.get(token, 0) + weight_T[t] * float(prob)
            if anchored is not None:
                mass[int(gold[t])] = mass.get(int(gold[t]), 0) + weight_T[t] * anchored
        mixed.append((mass, lost))
    return mixed


def added(gold, sources, weights, *, anchor: bool) -> Mixture:
    mixture = Mixture.empty(len(gold), capacity=sum(source.topk_ids_UK.shape[1] + 1 for source in sources))
    for source, weight_T in zip(sources, weights, strict=True):
        mixture.add(source, weight_T=weight_T, gold_ids_T=gold, gold_anchor=anchor)
    return mixture


@quick
@given(case=mixtures(), anchor=st.booleans())
def test_every_mass_is_where_a_dictionary_has_it(case, anchor):
    gold, sources, weights = case
    mixture = added(gold, sources, weights, anchor=anchor)
    for t, (mass, lost) in enumerate(mix(gold, sources, weights, anchor=anchor)):
        n = mixture.n_T[t]
        found = dict(zip(mixture.ids_TC[t, :n].tolist(), mixture.probs_TC[t, :n].tolist(), strict=True))
        assert len(found) == n, "a token twice"
        assert found == pytest.approx(mass, abs=1e-12)
        assert mixture.lost_T[t] == pytest.approx(lost, abs=1e-12)


@quick
@given(case=mixtures())
def test_without_anchor_what_is_kept_and_lost_is_all_there_was(case):
    gold, sources, weights = case
    mixture = added(gold, sources, weights, anchor=False)
    there_was = sum(
        np.where(source.position_T >= 0, weight_T * np.append(source.topk_probs_UK.sum(axis=1), 0)[source.position_T], 0)
        for source, weight_T in zip(sources, weights, strict=True)
    )
    np.testing.assert_allclose(mixture.probs_TC.sum(axis=1) + mixture.lost_T, there_was, atol=1e-12)


@quick
@given(case=mixtures())
def test_the_gold_token_has_exactly_the_sources_probability_of_the_text(case):
    gold, (source, *_), _ = case
    mixture = added(gold, [source], np.ones((1, len(gold))), anchor=True)
    found = gold_probabilities(source, gold_ids_T=gold)
    for t in range(len(gold)):
        expected = probability_of_gold(source, gold, t)
        if expected is None:
            assert math.isnan(found[t])
            continue
        assert found[t] == pytest.approx(expected, rel=1e-12)
        n = mixture.n_T[t]
        assert mixture.ids_TC[t, :n].tolist().count(gold[t]) == 1
        assert mixture.probs_TC[t, mixture.ids_TC[t, :n].tolist().index(gold[t])] == pytest.approx(expected, rel=1e-12)


@quick
@given(case=mixtures(), anchor=st.booleans(), k=st.integers(1, 6))
def test_top_is_the_sorted_beginning_with_the_gold_token_kept(case, anchor, k):
    gold, sources, weights = case
    mixture = added(gold, sources, weights, anchor=anchor)
    ids_TK, probs_TK = mixture.top(k, gold_ids_T=gold)
    for t in range(len(gold)):
        mass = dict(zip(mixture.ids_TC[t, : mixture.n_T[t]].tolist(), mixture.probs_TC[t].tolist(), strict=False))
        ranked = sorted(((-prob, token) for token, prob in mass.items() if prob > 0))
        expected = [(token, -prob) for prob, token in ranked[:k]]
        if mass.get(int(gold[t]), 0) > 0 and int(gold[t]) not in dict(expected):
            expected[-1] = (int(gold[t]), mass[int(gold[t])])
        n = len(expected)
        assert ids_TK[t, :n].tolist() == [token for token, _ in expected]
        assert probs_TK[t, :n].tolist() == [prob for _, prob in expected]
        assert not probs_TK[t, n:].any()


def test_an_id_beyond_the_map_is_lost_and_the_identity_maps_everything():
    """A model may have more logits than its tokenizer has tokens."""
    parts = {
        "topk_ids_UK": np.array([[5, 0]], np.uint16), "topk_probs_UK": np.array([[0.5, 0.25]], np.float32),
        "gold_ids_U": np.array([0]), "gold_logprob_U": np.array([math.nan]), "position_T": np.array([0], np.int32),
    }  # fmt: skip
    gold = np.array([-1])
    beyond = added(gold, [SourcePart(**parts, target_ids_V=np.array([3], np.int32))], np.ones((1, 1)), anchor=True)
    assert (beyond.n_T[0], beyond.ids_TC[0, 0], beyond.probs_TC[0, 0], beyond.lost_T[0]) == (1, 3, 0.25, 0.5)
    identity = added(gold, [SourcePart(**parts, target_ids_V=None)], np.ones((1, 1)), anchor=True)
    assert (identity.ids_TC[0, :2].tolist(), identity.lost_T[0]) == ([5, 0], 0)


costs = st.lists(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.5, math.inf]) | st.floats(0, 20), min_size=3, max_size=3), min_size=1, max_size=4
)


@quick
@given(costs=costs)
def test_source_weights_are_those_of_the_formula(costs):
    mince, avgce = (source_weights(np.array(costs), method=method) for method in ("mince", "avgce"))
    for s in range(3):
        column = [row[s] for row in costs]
        assert mince[:, s].tolist() == [float(n == column.index(min(column))) for n in range(len(column))]
        if min(column) == math.inf:
            assert avgce[:, s].tolist() == [1.0] + [0.0] * (len(column) - 1)
            continue
        exps = [math.exp(math.exp(-cost)) if cost < math.inf else 0 for cost in column]
        assert avgce[:, s].tolist() == pytest.approx([value / sum(exps) for value in exps], rel=1e-12)


def test_segment_costs_are_bits_per_byte_or_nats_per_token():
    amounts = {"n_scored_S": np.array([4, 0, 5], np.uint32), "scored_bytes_S": np.array([10, 0, 0], np.uint32)}
    nll_S = np.array([8 * math.log(2), 0.0, 3.0])
    assert segment_costs(nll_S, **amounts, metric="bpb").tolist() == pytest.approx([0.8, math.inf, math.inf])
    assert segment_costs(nll_S, **amounts, metric="ce").tolist() == pytest.approx([2 * math.log(2), math.inf, 0.6])


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
        own, source=other, target=own,
        source_tokenizer_folder=tmp_path / "tokenizers" / "source", target_tokenizer_folder=tmp_path / "tokenizers" / "target",
    )  # fmt: skip
    alignment = stored(tmp_path, "alignments", stage.compute(0))
    maps = stored(tmp_path, "vocab_maps", VocabularyMapStage(own, source=source, target=target, rule="prefix").compute(0))
    return FusionSource(name="target", distributions=own), FusionSource(
        name="source", distributions=other, alignment=alignment, vocabulary_map=maps
    )


def fused(sources, *, anchor: bool = True, top_k: int = K, **config) -> PartContent:
    return FusionStage(
        sources[0].distributions, sources=list(sources), alignment=AlignmentConfig(gold_anchor=anchor),
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
    assert content.data["source_S"].tolist() == [SEVERAL] * 4
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
    content = AlignmentsStage(own.distributions, source=other.distributions, target=nothing, **folders).compute(0)
    assert content.counts == {"segments": 0, "tokens": 0, "aligned": 0}
    aligned = stored(tmp_path, "alignments-of-nothing", content)
    sources = [
        FusionSource(name="target", distributions=nothing),
        FusionSource(name="source", distributions=other.distributions, alignment=aligned, vocabulary_map=other.vocabulary_map),
    ]
    assert fused(sources).counts == {"segments": 0, "tokens": 0, "from_target": 0, "from_source": 0}
