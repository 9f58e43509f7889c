"""Weights of sources, and what fusion makes of them and says of each source, against plain Python."""

import dataclasses
import itertools
import math

import numpy as np
import polars as pl
import pytest
from fuseline.align.config import AlignmentConfig, FusionConfig
from fuseline.align.contributions import contributions, favourites
from fuseline.align.fusion import FusionStage, fusion_identity
from fuseline.align.projection import Projection
from fuseline.align.sources import FusionSource
from fuseline.align.weights import fixed_weights, position_costs, source_weights, speaking_weights, unit_costs, units
from fuseline.store.content import check_content
from fuseline.store.dataset import Dataset, PartContent
from fuseline.store.errors import DamagedPart
from fuseline.store.targets import ONE_HOT, SEVERAL
from hypothesis import given, settings
from hypothesis import strategies as st

quick = settings(max_examples=200, deadline=None)
costs = st.lists(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.5, 900.0, math.inf]) | st.floats(0, 20), min_size=3, max_size=3), min_size=1, max_size=4
)


@quick
@given(costs=costs)
def test_source_weights_are_those_of_the_formulas(costs):
    found = {method: source_weights(np.array(costs), method=method) for method in ("mince", "avgce", "entropy", "confidence")}
    for x in range(3):
        column = [row[x] for row in costs]
        lowest = min(column)
        assert found["mince"][:, x].tolist() == [float(n == column.index(lowest)) for n in range(len(column))]
        for method in ("avgce", "entropy", "confidence"):
            if lowest == math.inf:
                assert found[method][:, x].tolist() == [1.0] + [0.0] * (len(column) - 1)
                continue
            scores = [(math.exp(-c) if method == "avgce" else lowest - c) if c < math.inf else -math.inf for c in column]
            total = sum(map(math.exp, scores))
            assert found[method][:, x].tolist() == pytest.approx([math.exp(score) / total for score in scores], rel=1e-12)


@quick
@given(lengths=st.lists(st.integers(0, 9), max_size=12), pack_length=st.integers(2, 12))
def test_packs_are_full_but_for_what_comes_next(lengths, pack_length):
    pack_S = units("pack", doc_id_S=np.zeros(len(lengths)), lengths_S=np.array(lengths, np.int64), pack_length=pack_length).tolist()
    expected, held = [], []
    for length in lengths:
        if sum(held) and sum(held) + length > pack_length:
            held = []
            expected.append(expected[-1] + 1)
        else:
            expected.append(expected[-1] if expected else 0)
        held.append(length)
    assert pack_S == expected


def test_units_of_segments_and_documents():
    doc_id_S, lengths_S = np.array([3, 3, 5, 8, 8, 8]), np.ones(6, np.int64)
    assert units("segment", doc_id_S=doc_id_S, lengths_S=lengths_S, pack_length=0).tolist() == [0, 1, 2, 3, 4, 5]
    assert units("document", doc_id_S=doc_id_S, lengths_S=lengths_S, pack_length=0).tolist() == [0, 0, 1, 2, 2, 2]


def test_costs_of_units_are_bits_per_byte_or_nats_per_token_of_units_that_were_read_whole():
    """Unit 0 has two segments and one of a single token, 1 and 3 lack a segment, of 2 no bytes are scored."""
    amounts = {
        "n_scored_S": np.array([4, 0, 0, 5, 5, 7, 0]), "scored_bytes_S": np.array([10, 0, 0, 0, 30, 9, 0]),
        "has_read_S": np.array([True, True, False, True, True, True, False]), "unit_S": np.array([0, 0, 1, 2, 0, 3, 3]),
    }  # fmt: skip
    nats_S = np.array([8 * math.log(2), 0.0, 0.0, 3.0, 12 * math.log(2), 0.5, 0.0])
    assert unit_costs(nats_S, **amounts, metric="bpb").tolist() == pytest.approx([20 / 40, math.inf, math.inf, math.inf])
    assert unit_costs(nats_S, **amounts, metric="ce").tolist() == pytest.approx([20 * math.log(2) / 9, math.inf, 0.6, math.inf])


def projection(entries: list[dict[int, float] | None], gold: list[float]) -> Projection:
    """Of each position the probability of each token, or None where the source says nothing."""
    n, capacity = len(entries), max(len(found or {}) for found in entries) + 1
    ids_TC, probs_TC = np.full((n, capacity), 99, np.int32), np.full((n, capacity), 0.99, np.float32)  # beyond n_T: anything
    for t, found in enumerate(entries):
        ids_TC[t, : len(found or {})], probs_TC[t, : len(found or {})] = list(found or {}), list((found or {}).values())
    some_T = np.array([0.0 if found is None else sum(found.values()) for found in entries], np.float32)
    is_aligned_T = np.array([found is not None for found in entries])
    return Projection(
        ids_TC=ids_TC, probs_TC=probs_TC, n_T=np.array([len(found or {}) for found in entries], np.int32), is_aligned_T=is_aligned_T,
        mapped_T=some_T, merged_T=np.zeros(n, np.float32), lost_T=((1 - some_T) * is_aligned_T).astype(np.float32),
        tail_T=np.zeros(n, np.float32), gold_logprob_T=np.array(gold, np.float32),
    )  # fmt: skip


def test_costs_of_positions_are_of_the_next_token_or_of_the_projected_distribution():
    found = projection([{1: 0.5, 2: 0.25}, None, {}, {7: 1.0}], [-0.5, math.nan, -math.inf, math.nan])
    assert position_costs(found, method="mince").tolist() == [0.5, math.inf, math.inf, math.inf]
    assert position_costs(found, method="confidence")[[0, 1, 3]].tolist() == pytest.approx([math.log(2), math.inf, 0])
    entropy = 0.5 * math.log(2) + 2 * 0.25 * math.log(4)
    assert position_costs(found, method="entropy").tolist() == pytest.approx([entropy, math.inf, 0, 0])


def test_of_one_token_confidence_weighs_by_the_highest_probabilities():
    two = [projection([{1: 0.6, 2: 0.3}], [-1]), projection([{1: 0.2}], [-1])]
    weights = source_weights(np.array([position_costs(each, method="confidence") for each in two]), method="confidence")
    assert weights[:, 0].tolist() == pytest.approx([0.75, 0.25])


def test_favourites_are_the_most_probable_tokens_and_of_equals_the_lowest():
    assert favourites(projection([{4: 0.25, 3: 0.25, 2: 0.1}, None, {}, {5: 0.0}], [0] * 4)).tolist() == [3, -1, -1, -1]


def test_fixed_weights_are_the_domains_or_else_the_common_ones():
    found = fixed_weights({"a": 1, "b": 3}, domain_weights={"law": {"c": 2.0}}, names=["a", "b", "c"], domain_S=["law", None, "code"])
    assert found.T.tolist() == [[0, 0, 1], [0.25, 0.75, 0], [0.25, 0.75, 0]]


@quick
@given(data=st.data(), n=st.integers(1, 4))
def test_where_a_source_says_nothing_its_weight_goes_to_the_others_in_proportion(data, n):
    weights = [data.draw(st.sampled_from([0.0, 0.25, 1.0])) for _ in range(n)]
    speaks = [data.draw(st.booleans()) for _ in range(n)]
    found, silent = speaking_weights(np.array(weights)[:, None], is_aligned_NT=np.array(speaks)[:, None])
    left = [weight if speaking else 0 for weight, speaking in zip(weights, speaks, strict=True)]
    assert silent.tolist() == [sum(left) == 0]
    assert found[:, 0].tolist() == pytest.approx([weight / (sum(left) or 1) for weight in left])


def test_contributions_are_means_and_sums_over_each_segments_positions():
    own = projection([{1: 0.5}, {2: 0.5}, {3: 0.5}, {4: 0.5}], [-1, -2, math.nan, math.nan])
    other = projection([{1: 0.25, 9: 0.25}, {9: 0.75}, None, None], [-3, -math.inf, math.nan, math.nan])
    found = contributions(
        [own, other], offsets=np.array([0, 3, 4]), costs_NT=np.array([[1.0, 1, 1, 2], [3, 4, math.inf, math.inf]]),
        weights_NT=np.array([[0.0, 0, 1, 1], [1, 1, 0, 0]]), shares_NT=np.array([[0.0, 0, 1, 1], [1, 1, 0, 0]]),
        nll_NS=np.array([[3.0, 4.0], [5.0, math.nan]]),
    )  # fmt: skip
    assert {name: array.shape for name, array in found.items()} == dict.fromkeys(found, (2, 2))
    rows = {name: array.tolist() for name, array in found.items()}
    assert rows["n_spoken_SN"] == [[3, 2], [1, 0]]
    assert rows["n_gold_SN"] == [[2, 1], [0, 0]]
    assert rows["gold_nll_SN"] == [[3, 3], [0, 0]]
    assert rows["cost_SN"][0] == [1, 3.5]
    assert rows["weight_SN"] == rows["share_SN"] == [[pytest.approx(1 / 3), pytest.approx(2 / 3)], [1, 0]]
    assert rows["agreement_SN"][0] == [1, 0.5]
    assert rows["lost_SN"][0] == [0.5, 0.375]
    for name in ("cost_SN", "agreement_SN", "mapped_SN", "lost_SN", "merged_SN", "tail_SN", "nll_SN"):
        assert math.isnan(rows[name][1][1]), name


# From here on whole stages, on datasets made by hand: byte ranges and tokens are the same for all models, so alignments are identities.

DOC_ID_S, LENGTHS_S, V, K = np.array([3, 3, 5, 8]), np.array([4, 2, 5, 3]), 12, 4


def distributions(folder, name: str, *, seed: int, nats_S: list[float], leave_out: tuple[int, ...] = ()) -> Dataset:
    tokens = np.random.default_rng(0)  # the same for every model
    token_ids_T = tokens.integers(0, V, LENGTHS_S.sum())
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(len(token_ids_T), V)) * 2
    logprobs_TV = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    topk_TK = np.argsort(-logprobs_TV, axis=1)[:, :K]
    gold_T = logprobs_TV[np.arange(len(token_ids_T)), np.append(token_ids_T[1:], 0)]
    gold_T[np.cumsum(LENGTHS_S) - 1] = np.nan
    keep_S = ~np.isin(DOC_ID_S, leave_out)
    keep_T = np.repeat(keep_S, LENGTHS_S)
    arrays = {
        "token_ids_T": token_ids_T.astype(np.uint16), "topk_ids_TK": topk_TK.astype(np.uint16),
        "topk_logprobs_TK": np.take_along_axis(logprobs_TV, topk_TK, axis=1).astype(np.float16),
        "gold_logprob_T": gold_T.astype(np.float16), "entropy_T": -(np.exp(logprobs_TV) * logprobs_TV).sum(axis=1).astype(np.float16),
    }  # fmt: skip
    per_segment = {
        "doc_id_S": DOC_ID_S, "segment_S": np.array([0, 1, 0, 0], np.uint32), "nll_S": np.array(nats_S),
        "n_scored_S": (LENGTHS_S - 1).astype(np.uint32), "scored_bytes_S": (2 * (LENGTHS_S - 1)).astype(np.uint32),
    }  # fmt: skip
    data = {name: array[keep_T] for name, array in arrays.items()} | {name: array[keep_S] for name, array in per_segment.items()}
    data["segment_offsets"] = np.concatenate([[0], np.cumsum(LENGTHS_S[keep_S])])
    dataset = Dataset.create(folder / "distributions" / name, identity={"name": name})
    dataset.commit(0, content=PartContent(data=data, counts={}), seconds=0)
    return dataset


@pytest.fixture
def three(tmp_path):
    """The target's start; a source that lacks document 5 and two positions of four; one that has all."""
    own = distributions(tmp_path, "own", seed=1, nats_S=[6, 2, 8, 4])
    first = distributions(tmp_path, "first", seed=2, nats_S=[3, 3, 3, 9], leave_out=(5,))
    second = distributions(tmp_path, "second", seed=3, nats_S=[9, 1, 9, 3])
    sources = [FusionSource(name="own", distributions=own)]
    keep_T = np.repeat(DOC_ID_S != 5, LENGTHS_S)
    place_T = np.where(keep_T, np.cumsum(keep_T) - 1, -1)
    for source, position_T in ((first, np.where(np.arange(len(place_T)) % 4 >= 2, -1, place_T)), (second, np.arange(len(place_T)))):
        alignment = Dataset.create(tmp_path / "alignments" / source.name, identity={"name": source.name})
        alignment.commit(0, content=PartContent(data={"source_position_T": position_T.astype(np.int32)}, counts={}), seconds=0)
        sources.append(FusionSource(name=source.name, distributions=source, alignment=alignment))
    return sources


def fused(sources, *, corpus=None, top_k: int = V, **config) -> PartContent:
    stage = FusionStage(
        sources[0].distributions, sources=list(sources), alignment=AlignmentConfig(positions="span", gold_anchor=False),
        fusion=FusionConfig(**config), top_k=top_k, corpus=corpus,
    )  # fmt: skip
    return stage.compute(0)


def entries(content: PartContent, t: int) -> dict[int, float]:
    pairs = zip(content.data["topk_ids_TK"][t].tolist(), content.data["topk_logprobs_TK"][t].tolist(), strict=True)
    return {token: math.exp(logprob) for token, logprob in pairs if logprob > -math.inf}


def stored(source: FusionSource) -> list[dict[int, float] | None]:
    """What a source says at each target position."""
    ids_UK, logprobs_UK = source.distributions.read(0, "topk_ids_TK", "topk_logprobs_TK")
    (position_T,) = source.alignment.read(0, "source_position_T") if source.alignment else (np.arange(len(ids_UK)),)
    return [None if u < 0 else {int(v): math.exp(p) for v, p in zip(ids_UK[u], logprobs_UK[u], strict=True)} for u in position_T.tolist()]


def mixed(sources, weights: list[float], t: int) -> dict[int, float]:
    total: dict[int, float] = {}
    said = [stored(source)[t] for source in sources]
    said = [found if weight else None for weight, found in zip(weights, said, strict=True)]
    scale = sum(weight for weight, found in zip(weights, said, strict=True) if found is not None)
    for weight, found in zip(weights, said, strict=True):
        for token, prob in (found or {}).items():
            total[token] = total.get(token, 0) + weight / scale * prob
    return total


SEGMENT_T = np.repeat(np.arange(4), LENGTHS_S)


@pytest.mark.parametrize(
    ("config", "chosen"),
    [
        # Document 5 the first source has not read, so in a unit of its own, or with others, another one wins.
        ({"unit": "segment"}, [1, 2, 0, 2]),
        ({"unit": "document"}, [1, 1, 0, 2]),  # 8, 6 and 10 nats over document 3
        ({"unit": "pack", "pack_length": 6}, [1, 1, 0, 2]),  # packs of 4 + 2, 5, 3 tokens
        ({"unit": "pack", "pack_length": 11}, [0, 0, 0, 2]),  # 4 + 2 + 5 and 3: what `first` has read of it would cost least
        ({"unit": "pack", "pack_length": 100}, [0, 0, 0, 0]),
    ],
)
def test_mince_compares_the_sources_over_the_unit(three, config, chosen):
    content = fused(three, **config)
    assert content.data["source_S"].tolist() == chosen
    for t, s in enumerate(SEGMENT_T):
        source = chosen[s] if stored(three[chosen[s]])[t] is not None else 0
        assert content.data["source_T"][t] == source
        assert entries(content, t) == pytest.approx(stored(three[source])[t], rel=2e-3)


@pytest.mark.parametrize("metric", ["bpb", "ce"])
def test_by_token_each_position_takes_who_gives_the_next_token_most(three, metric):
    content = fused(three, unit="token", metric=metric)
    token_ids_T = content.data["token_ids_T"].tolist()
    last = set((np.cumsum(LENGTHS_S) - 1).tolist())
    for t, source in enumerate(content.data["source_T"].tolist()):
        gold = [0.0 if t in last else (stored(each)[t] or {}).get(token_ids_T[t + 1], 0.0) for each in three]
        assert source == gold.index(max(gold))
    assert len(set(content.data["source_T"].tolist())) == 3


@pytest.mark.parametrize("method", ["entropy", "confidence"])
@pytest.mark.parametrize("metric", ["bpb", "ce"])
def test_entropy_and_confidence_weigh_by_how_sure_the_sources_are_of_the_unit(three, method, metric):
    content = fused(three, method=method, metric=metric)
    starts = np.concatenate([[0], np.cumsum(LENGTHS_S)])
    for s in (0, 1, 3):
        scores = []
        for source in three:
            entropy_T, logprobs_TK, offsets, doc_id_S = source.distributions.read(
                0, "entropy_T", "topk_logprobs_TK", "segment_offsets", "doc_id_S"
            )
            place = [0, 1, None, 2][s] if 5 not in doc_id_S else s
            span = slice(offsets[place], offsets[place + 1] - 1)  # nothing follows the last
            nats = (entropy_T if method == "entropy" else -logprobs_TK[:, 0])[span].astype(float).sum()
            n = LENGTHS_S[s] - 1
            scores.append(math.exp(-(nats / (2 * n * math.log(2)) if metric == "bpb" else nats / n)))
        weights = [score / sum(scores) for score in scores]
        assert content.data["weight_SN"][s].tolist() == pytest.approx(weights, rel=1e-4)
        for t in range(starts[s], starts[s + 1]):
            assert entries(content, t) == pytest.approx(mixed(three, weights, t), rel=2e-3)


def test_fixed_weights_go_by_the_domain_of_the_document(three, tmp_path):
    corpus = Dataset.create(tmp_path / "corpus" / "corpus", identity={})
    table = pl.DataFrame({"doc_id": DOC_ID_S, "domain": ["law", "law", None, "code"]})
    corpus.commit(0, content=PartContent(data=table, counts={}), seconds=0)
    config = {"method": "fixed", "weights": {"own": 1.0, "second": 3.0}, "domain_weights": {"law": {"first": 1.0}}}
    content = fused(three, corpus=corpus, **config)
    for t, s in enumerate(SEGMENT_T):
        is_law = s < 2
        weights = [0.0, 1.0, 0.0] if is_law else [0.25, 0.0, 0.75]
        if is_law and stored(three[1])[t] is None:
            weights = [1.0, 0.0, 0.0]
        assert entries(content, t) == pytest.approx(mixed(three, weights, t), rel=2e-3)
    assert content.data["source_S"].tolist() == [1, 1, SEVERAL, SEVERAL]


@pytest.mark.parametrize(("fallback", "shift"), [("one_hot", 1), ("one_hot_published", 0)])
def test_where_the_chosen_source_says_nothing_all_mass_is_on_one_token(three, fallback, shift):
    content = fused(three[:2], fallback=fallback)
    token_ids_T = content.data["token_ids_T"].tolist()
    last = set((np.cumsum(LENGTHS_S) - 1).tolist())
    silent = [t for t, s in enumerate(SEGMENT_T) if content.data["source_S"][s] == 1 and stored(three[1])[t] is None]
    assert len(silent) >= 2
    assert {t in last for t in silent} == {True, False}
    for t in silent:
        if t in last and shift:
            assert content.data["source_T"][t] == 0  # nothing follows
            continue
        assert content.data["source_T"][t] == ONE_HOT
        assert entries(content, t) == {token_ids_T[t + shift]: 1.0}
        assert content.data["tail_logprob_T"][t] == -math.inf
    assert content.attributes["one_hot"] == ("next token" if shift else "this token")
    for t, s in enumerate(SEGMENT_T):
        if content.data["source_S"][s] == 0:
            assert content.data["source_T"][t] == 0


def test_what_each_source_brings_adds_up(three):
    for method, unit in itertools.product(("mince", "avgce", "entropy", "confidence"), ("token", "segment", "document")):
        data = fused(three, method=method, unit=unit).data
        np.testing.assert_allclose(data["weight_SN"].sum(axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(data["share_SN"].sum(axis=1), 1, rtol=1e-5)
        total = sum(data[name] for name in ("mapped_SN", "merged_SN", "lost_SN", "tail_SN"))
        np.testing.assert_allclose(np.where(data["n_spoken_SN"] > 0, total, 1), 1, rtol=1e-5)
        assert (data["agreement_SN"][:, 0] == 1).all()
        assert data["nll_SN"][2].tolist()[::2] == [8, 9]
        assert math.isnan(data["nll_SN"][2, 1])
        assert data["n_spoken_SN"][:, 0].tolist() == LENGTHS_S.tolist()
        assert data["n_spoken_SN"][2, 1] == 0


@pytest.mark.parametrize("fallback", ["target", "one_hot", "one_hot_published"])
def test_what_is_fused_is_found_in_order_and_a_share_that_is_off_is_reported(three, tmp_path, fallback):
    content = fused(three[:2], fallback=fallback)
    assert (ONE_HOT in content.data["source_T"]) == (fallback != "target")
    sound = Dataset.create(tmp_path / "targets" / "sound", identity={})
    counts = {"tokens": len(SEGMENT_T), "segments": len(LENGTHS_S)}
    sound.commit(0, content=dataclasses.replace(content, counts=counts), seconds=0)
    check_content(sound, 0)
    damaged = Dataset.create(tmp_path / "targets" / "damaged", identity={})
    data = content.data | {"share_SN": content.data["share_SN"] + np.float32(0.1)}
    damaged.commit(0, content=dataclasses.replace(content, counts=counts, data=data), seconds=0)
    with pytest.raises(DamagedPart, match="share_SN must sum over the sources to 1"):
        check_content(damaged, 0)


def test_the_fused_likelihood_of_the_text_is_that_of_its_entries(three):
    content = fused(three, method="avgce")
    token_ids_T = content.data["token_ids_T"].tolist()
    starts = np.concatenate([[0], np.cumsum(LENGTHS_S)])
    for s in range(4):
        gold = [entries(content, t).get(token_ids_T[t + 1]) for t in range(starts[s], starts[s + 1] - 1)]
        assert content.data["n_gold_S"][s] == sum(prob is not None for prob in gold)
        assert content.data["gold_nll_S"][s] == pytest.approx(-sum(math.log(prob) for prob in gold if prob), rel=1e-3)


def identity(three, **config):
    return fusion_identity(three, alignment=AlignmentConfig(), fusion=FusionConfig(**config), top_k=4)


def test_choices_that_make_no_difference_leave_the_identity_as_it_is(three):
    fixed = {"method": "fixed", "domain_weights": {"law": {"first": 2.0}}}
    for one, other in [
        ({"unit": "token", "metric": "bpb"}, {"unit": "token", "metric": "ce"}),
        ({"pack_length": 8}, {"pack_length": 9}),
        (fixed | {"weights": {"own": 1.0, "first": 3.0}}, fixed | {"weights": {"first": 0.75, "own": 0.25, "second": 0.0}}),
        (fixed | {"weights": {"own": 1.0}}, fixed | {"weights": {"own": 1.0}, "domain_weights": {"law": {"first": 5.0}}}),
    ]:
        assert identity(three, **one) == identity(three, **other)
    assert identity(three).keys() == identity(three, **fixed, weights={"own": 1.0}).keys()


def test_what_changes_the_targets_changes_their_identity(three):
    fixed = {"method": "fixed", "weights": {"own": 1.0}}
    configs = [
        {}, {"metric": "ce"}, {"unit": "token"}, {"unit": "document"},
        {"unit": "pack", "pack_length": 8}, {"unit": "pack", "pack_length": 9},
        {"method": "entropy"}, {"method": "confidence"}, {"fallback": "one_hot"}, {"fallback": "one_hot_published"}, fixed,
        fixed | {"metric": "ce"},
        fixed | {"weights": {"own": 1.0, "first": 1.0}}, fixed | {"domain_weights": {"law": {"own": 1.0}}},
        fixed | {"domain_weights": {"law": {"first": 1.0}}},
    ]  # fmt: skip
    found = [identity(three, **config) for config in configs]
    assert all(a != b for a, b in itertools.combinations(found, 2))
