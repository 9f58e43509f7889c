"""Alignment and fusion as stages, on datasets made by hand, against dictionaries in plain Python."""

import itertools
import math
import unicodedata

import numpy as np
import pytest
from fuseline.align.alignments import AlignmentsStage
from fuseline.align.config import AlignmentConfig, FusionConfig
from fuseline.align.fusion import FusionStage
from fuseline.align.maps import VocabularyMapStage
from fuseline.align.sources import FusionSource, gold_ids
from fuseline.store.dataset import Dataset, PartContent
from fuseline.store.targets import SEVERAL
from fuseline.store.tokenizer import Tokenizer
from support.tiny import train_composing

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
        own, source=other, target=own, positions="span",
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
    content = AlignmentsStage(own.distributions, source=other.distributions, target=nothing, positions="span", **folders).compute(0)
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
        own.distributions, source=other.distributions, target=own.distributions, positions="cover",
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
        datasets["target"], **datasets, positions="cover",
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
