"""Forward passes against a full float32 log-softmax, one segment at a time, without padding or blocks."""

import itertools
import json
import math
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from fuseline.ingest import forward
from fuseline.ingest.distributions import DistributionsStage
from fuseline.ingest.forward import CausalModel, batches, exact_top_k, reduce_logits
from fuseline.store.dataset import Dataset, PartContent
from fuseline.store.errors import DataError
from fuseline.store.tokenizer import Tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rounding import LANES, model_terms, rounding
from transformers import AutoModelForCausalLM


def dense(logits_NV: torch.Tensor, gold_N: torch.Tensor, k: int) -> dict[str, np.ndarray]:
    """The same fields, in float64 from the whole softmax."""
    logprobs_NV = logits_NV.double().log_softmax(-1)
    top = logprobs_NV.topk(max(k, 1))
    return {
        "topk_logprobs_TK": top.values[:, :k].numpy(),
        "gold_logprob_T": logprobs_NV.gather(1, gold_N[:, None])[:, 0].numpy(),
        "tail_T": 1 - top.values[:, :k].exp().sum(-1).numpy(),
        "entropy_T": -(logprobs_NV.exp() * logprobs_NV).sum(-1).numpy(),
    }


def assert_same(found: dict, expected: dict, *, logits_NV: torch.Tensor, terms: float = 1) -> None:
    """`logits_NV` are in float32 arithmetic, sums of so many `terms`; the logarithm of a softmax's sum has the sum's relative error."""
    largest, vocab = logits_NV.abs().max().item(), logits_NV.shape[1]
    of_logits, of_sum = rounding(largest, terms=terms), rounding(1, terms=vocab / LANES)
    for name in ("topk_logprobs_TK", "gold_logprob_T"):
        np.testing.assert_allclose(found[name], expected[name], atol=2 * of_logits + of_sum, rtol=0, err_msg=name)
    np.testing.assert_allclose(found["entropy_T"], expected["entropy_T"], atol=2 * of_logits + (1 + largest) * of_sum, rtol=0)
    # Probabilities have the absolute errors of their logarithms at most, and their sum is at most 1.
    np.testing.assert_allclose(np.exp(found["tail_logprob_T"]), expected["tail_T"], atol=2 * of_logits + of_sum)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "vocab", "k"), [(1, 2, 1), (5, 7, 7), (40, 600, 10), (3, 50_000, 10), (9, 600, 0)])
def test_reduced_logits_are_those_of_the_whole_softmax(n, vocab, k, dtype, monkeypatch):
    random = torch.Generator().manual_seed(vocab)
    logits_NV = (torch.randn(n, vocab, generator=random) * 6).to(dtype)
    gold_N = torch.randint(0, vocab, (n,), generator=random)
    kept = logits_NV.clone()
    whole = {name: value.numpy() for name, value in reduce_logits(logits_NV, gold_N=gold_N, top_k=k).items()}
    torch.testing.assert_close(logits_NV, kept, rtol=0, atol=0)  # the caller's logits are not overwritten
    expected = dense(logits_NV, gold_N, k)
    assert_same(whole, expected, logits_NV=logits_NV)
    assert whole["topk_ids_TK"].shape == (n, k)
    chosen = torch.from_numpy(whole["topk_ids_TK"])
    logprobs = logits_NV.double().log_softmax(-1).gather(1, chosen).numpy()
    np.testing.assert_allclose(logprobs, expected["topk_logprobs_TK"], atol=0)
    monkeypatch.setattr(forward, "_REDUCE_BYTES", 4 * vocab * 2)  # blocks of two rows
    blocked = reduce_logits(logits_NV, gold_N=gold_N, top_k=k)
    for name, value in whole.items():
        np.testing.assert_allclose(
            blocked[name].numpy(), value, atol=rounding(1 + logits_NV.abs().max(), terms=vocab / LANES), err_msg=name
        )


def test_a_certain_model_has_no_tail_and_no_entropy():
    logits_NV = torch.tensor([[1000.0, 0.0, -1000.0], [0.0, 0.0, 0.0]])
    found = reduce_logits(logits_NV, gold_N=torch.tensor([2, 1]), top_k=1)
    assert found["tail_logprob_T"].tolist() == [-math.inf, pytest.approx(math.log(2 / 3))]
    assert found["entropy_T"].tolist() == pytest.approx([0, math.log(3)], abs=1e-6)
    assert found["gold_logprob_T"].tolist() == pytest.approx([-2000, -math.log(3)])


def test_logits_of_minus_infinity_have_no_share_and_nan_stays_in_its_row():
    """Some models give -inf to columns that stand for no token."""
    logits_NV = torch.randn(4, 600, generator=torch.Generator().manual_seed(0))
    logits_NV[:, 500:] = -math.inf
    logits_NV[2, 7] = math.nan
    found = reduce_logits(logits_NV, gold_N=torch.tensor([3, 550, 3, 499]), top_k=10)
    healthy = [0, 1, 3]
    expected = dense(logits_NV[healthy, :500], torch.tensor([3, 0, 499]), 10)
    expected["gold_logprob_T"][1] = -math.inf
    same = {name: value[healthy].numpy() for name, value in found.items()}
    assert_same(same, expected, logits_NV=logits_NV[healthy, :500])
    assert math.isnan(found["entropy_T"][2])
    assert math.isnan(found["gold_logprob_T"][2])


@settings(max_examples=150, deadline=None)
@given(vocab=st.sampled_from([1, 5, 127, 128, 640, 641, 5_000, 5_120, 9_999]), k=st.integers(1, 12), data=st.data())
def test_exact_top_k_is_exact_with_ties_and_for_any_vocabulary(vocab, k, data):
    k = min(k, vocab)
    levels = data.draw(st.sampled_from([2, 50, 10**6]))  # few levels: many ties
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    values_NV = torch.from_numpy(random.integers(0, levels, (3, vocab)).astype(np.float32))
    if data.draw(st.booleans()):
        values_NV[:, -min(k, vocab) :] += levels  # the largest in the rest after the last whole block
    values_NK, places_NK = exact_top_k(values_NV, k=k)
    assert values_NK.tolist() == [sorted(row, reverse=True)[:k] for row in values_NV.tolist()]
    assert values_NV.gather(1, places_NK).tolist() == values_NK.tolist()
    assert all(len(set(row)) == k for row in places_NK.tolist())


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), max_size=30), batch_tokens=st.integers(1, 100))
def test_batches_cover_each_segment_once_within_the_budget(lengths, batch_tokens):
    grouped = list(batches(np.array(lengths, np.int64), batch_tokens=batch_tokens))
    assert sorted(itertools.chain(*grouped)) == [s for s, length in enumerate(lengths) if length]
    for batch in grouped:
        padded = len(batch) * max(lengths[s] for s in batch)
        assert padded <= batch_tokens or len(batch) == 1
    for batch, following in itertools.pairwise(grouped):
        assert (len(batch) + 1) * lengths[batch[0]] > batch_tokens, "the next segment would have fitted"
        assert min(lengths[s] for s in batch) >= max(lengths[s] for s in following)


@pytest.fixture(scope="module")
def model(models_dir) -> CausalModel:
    return CausalModel(models_dir / "tiny-target", dtype="float32", arithmetic="float32", trust_remote_code=False)


@pytest.fixture
def segments() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 600, length).astype(np.uint16) for length in (17, 1, 40, 0, 3, 40, 2, 33, 0)]


def assert_distributions(model: CausalModel, segments: list[np.ndarray], *, top_k: int) -> None:
    found = model.distributions(segments, top_k=top_k)
    start = 0
    for segment in segments:
        here = slice(start, start + len(segment))
        start += len(segment)
        if not len(segment):
            continue
        ids = torch.from_numpy(segment.astype(np.int64))
        with torch.inference_mode():
            logits_NV = model.model(input_ids=ids[None].to(model.device)).logits[0].float().cpu()
        expected = dense(logits_NV, torch.cat([ids[1:], ids[:1]]), top_k)
        assert math.isnan(found.gold_logprob_T[here][-1])
        same = {name: getattr(found, name)[here] for name in ("topk_logprobs_TK", "gold_logprob_T", "entropy_T", "tail_logprob_T")}
        same["gold_logprob_T"][-1] = expected["gold_logprob_T"][-1]
        terms = model_terms(layers=2, hidden=32, ffn=64, head_dim=8, length=len(segment))
        assert_same(same, expected, logits_NV=logits_NV, terms=terms)
        chosen = logits_NV.log_softmax(-1).gather(1, torch.from_numpy(found.topk_ids_TK[here]))
        np.testing.assert_allclose(chosen.numpy(), expected["topk_logprobs_TK"], atol=2 * rounding(logits_NV, terms=terms))
    assert start == len(found.gold_logprob_T)


@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
@pytest.mark.parametrize("top_k", [0, 10])
def test_padding_and_batching_change_nothing(model, segments, batch_tokens, top_k, monkeypatch):
    monkeypatch.setattr(model, "batch_tokens", batch_tokens)
    monkeypatch.setattr(forward, "_HEAD_BYTES", 7 * 4 * 600)  # several blocks of the head in a batch
    assert model._head is not None
    assert_distributions(model, segments, top_k=top_k)


def test_no_segments_are_no_positions(model):
    found = model.distributions([], top_k=3)
    assert (found.topk_ids_TK.shape, found.gold_logprob_T.shape) == ((0, 3), (0,))
    assert model.distributions([np.zeros(0, np.uint16)], top_k=3).entropy_T.shape == (0,)


@pytest.fixture(scope="module")
def capped_folder(tmp_path_factory, models_dir):
    """Gemma 2 caps its logits after the output embedding: they are not the output embedding of the last hidden states."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("capped")
    config = Gemma2Config(
        vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, final_logit_softcapping=0.5, initializer_range=1.0, max_position_embeddings=128,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_model_that_caps_its_logits_is_not_shortcut(capped_folder, segments):
    capped = CausalModel(capped_folder, dtype="float32", arithmetic="float32", trust_remote_code=False)
    assert capped._head is None
    assert_distributions(capped, segments, top_k=5)
    found = capped.distributions(segments, top_k=5)
    assert (found.topk_logprobs_TK > -math.log(600) + -1.0).all()  # within ±0.5 of uniform


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_in_float32_arithmetic_only_the_weights_are_rounded(models_dir, capped_folder, dtype, family):
    """Gemma's embeddings have a factor, which is no weight."""
    folder = {"llama": models_dir / "tiny-target", "gemma2": capped_folder}[family]
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
    found = CausalModel(folder, dtype=dtype, arithmetic="float32", trust_remote_code=False)
    ids_BL = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(found.model(ids_BL).logits, expected(ids_BL).logits)
        assert not torch.equal(
            found.model(ids_BL).logits,
            CausalModel(folder, dtype="float32", arithmetic="float32", trust_remote_code=False).model(ids_BL).logits,
        )


@pytest.mark.parametrize(
    ("damage", "message"),
    [("no_config", r"config\.json: .*fix the file"), ("pickle_only", r"no \*\.safetensors"), ("no_such_type", "does not recognize")],
)
def test_a_model_that_cannot_be_loaded_is_reported(tmp_path, models_dir, damage, message):
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((models_dir / "tiny-target" / "config.json").read_text())
    if damage == "no_such_type":
        config |= {"model_type": "no-such-type", "architectures": ["NoSuchModel"]}
    if damage != "no_config":
        (folder / "config.json").write_text(json.dumps(config))
    if damage == "pickle_only":
        torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(DataError, match=message):
        CausalModel(folder, dtype="float32", arithmetic="float32", trust_remote_code=False)


# The stage


def corpus(folder, rows: list[tuple[int, int, str]], *, context_length: int = 64) -> Dataset:
    dataset = Dataset.create(folder / "corpus" / "corpus", identity={"context_length": context_length})
    table = pl.DataFrame(rows, schema={"doc_id": pl.Int64, "segment": pl.UInt32, "text": pl.String}, orient="row")
    dataset.commit(0, content=PartContent(data=table, counts={}), seconds=0)
    return dataset


def stage(folder, *, corpus: Dataset, model_folder, top_k: int = 4) -> DistributionsStage:
    Tokenizer.from_model_folder(model_folder).save(folder / "tokenizer")
    dataset = Dataset.create(folder / "distributions" / "model", identity={"top_k": top_k})
    return DistributionsStage(
        dataset, corpus=corpus, model_folder=model_folder, tokenizer_folder=folder / "tokenizer", dtype="float32",
        trust_remote_code=False, top_k=top_k,
    )  # fmt: skip


ROWS = [
    (2, 0, "def f(x):\n    return x\n"),
    (2, 1, "naïve 漢字 👩‍👩‍👧‍👦"),
    (4, 0, "one"),
    (7, 0, "the last of three documents"),
    (9, 0, ""),
]


@pytest.mark.parametrize("name", ["tiny-target", "tiny-source"])
@pytest.mark.parametrize("top_k", [0, 4])
def test_the_books_of_a_part_are_right(tmp_path, models_dir, name, top_k):
    """nll, numbers of tokens and bytes of each segment, against sums over the model's own log-softmax."""
    made = stage(tmp_path, corpus=corpus(tmp_path, ROWS), model_folder=models_dir / name, top_k=top_k)
    content = made.compute(0)
    arrays, tokenizer = content.data, made.tokenizer
    assert arrays["doc_id_S"].tolist() == [2, 2, 4, 7, 9]
    assert arrays["segment_S"].tolist() == [0, 1, 0, 0, 0]
    assert ("topk_ids_TK" in arrays) == bool(top_k)
    for s, (_, _, text) in enumerate(ROWS):
        start, end = arrays["segment_offsets"][s : s + 2]
        ids = ([tokenizer.roles["bos"]] if tokenizer.prepends_bos else []) + tokenizer.backend.encode(text, add_special_tokens=False).ids
        assert arrays["token_ids_T"][start:end].tolist() == ids
        gold = []
        if ids:
            with torch.inference_mode():
                logprobs_NV = made.model.model(input_ids=torch.tensor([ids], device=made.model.device)).logits[0].double().log_softmax(-1)
            gold = [logprobs_NV[j, token].item() for j, token in enumerate(ids[1:])]
        scored = gold[1:] if tokenizer.prepends_bos else gold  # the text's first token is not scored, for any model
        terms = model_terms(layers=2, hidden=32, ffn=64, head_dim=8, length=len(ids)) + 600 / LANES
        assert arrays["nll_S"][s] == pytest.approx(-sum(scored), abs=rounding(-sum(scored), terms=terms, averaged=max(len(scored), 1)))
        assert arrays["n_scored_S"][s] == len(scored)
        assert arrays["n_bytes_S"][s] == len(text.encode())
        rest = b"".join(tokenizer.token_bytes[token_id] for token_id in ids[len(ids) - len(scored) :])
        assert text.encode().endswith(rest)
        assert arrays["scored_bytes_S"][s] == len(rest)
        stored = arrays["gold_logprob_T"][start:end]
        np.testing.assert_allclose(stored[:-1], gold, atol=rounding(max(map(abs, gold), default=0), terms=terms))
        assert np.isnan(stored[-1:]).all()
    n = len(arrays["token_ids_T"])
    assert content.counts == {"documents": 4, "segments": 5, "tokens": n, "quarantined": 0}
    assert {len(array) for array_name, array in arrays.items() if array_name.endswith(("_T", "_TK"))} == {n}
    made.dataset.commit(0, content=content, seconds=0)
    assert made.dataset.read(0, "nll_S")[0].tolist() == arrays["nll_S"].tolist()


@pytest.fixture
def lower_casing(tmp_path, models_dir):
    """A model whose tokenizer loses capitals."""
    folder = tmp_path / "lower-casing"
    shutil.copytree(models_dir / "tiny-source", folder)
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["normalizer"]["normalizers"].insert(0, {"type": "Lowercase"})
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    return folder


def test_documents_that_the_tokenizer_cannot_represent_or_that_do_not_fit_are_left_out_with_their_reason(tmp_path, lower_casing):
    rows = [(1, 0, "fine"), (2, 0, "fine so far"), (2, 1, "a Capital"), (3, 0, "word " * 100), (4, 0, "fine too")]
    content = stage(tmp_path, corpus=corpus(tmp_path, rows), model_folder=lower_casing).compute(0)
    assert content.data["doc_id_S"].tolist() == [1, 4]
    reasons = {entry["doc_id"]: entry["reason"] for entry in content.attributes["quarantined"]}
    assert reasons.keys() == {2, 3}
    assert "cannot represent" in reasons[2]
    assert "more than context_length (64)" in reasons[3]
    assert content.counts["quarantined"] == 2
    alone = stage(tmp_path / "alone", corpus=corpus(tmp_path / "alone", [rows[0], rows[4]]), model_folder=lower_casing).compute(0)
    for name, array in alone.data.items():
        np.testing.assert_array_equal(content.data[name], array, err_msg=name)


def test_where_a_tokenizer_writes_text_in_another_way_its_places_in_the_text_are_stored(tmp_path, models_dir):
    rows = [(1, 0, "fine"), (2, 0, "a ▁ mark"), (3, 0, "fine too")]
    content = stage(tmp_path, corpus=corpus(tmp_path, rows), model_folder=models_dir / "tiny-source").compute(0)
    assert content.data["doc_id_S"].tolist() == [1, 2, 3]
    ends_T, offsets = content.data["byte_ends_T"], content.data["segment_offsets"]
    assert (ends_T.dtype, len(ends_T)) == (np.int32, offsets[-1])
    for (start, end), (_, _, text) in zip(itertools.pairwise(offsets), rows, strict=True):
        assert (ends_T[start], ends_T[end - 1]) == (-1, len(text.encode())), "from bos, before the dummy prefix, to the end"
    assert content.data["scored_bytes_S"][1] <= len("a ▁ mark".encode())
    without = stage(tmp_path / "without", corpus=corpus(tmp_path / "without", [rows[0]]), model_folder=models_dir / "tiny-source").compute(
        0
    )
    assert "byte_ends_T" not in without.data


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory, byte_level_folder):
    """A model whose input embedding of the token `Z` alone is not a number."""
    from support.tiny import save_model
    from transformers import AutoModelForCausalLM

    folder = save_model(tmp_path_factory.mktemp("poisoned") / "model", tokenizer_folder=byte_level_folder, seed=5)
    tokenizer = Tokenizer.from_model_folder(folder)
    (token_id,) = tokenizer.encode(["Z"])[0]
    tied = AutoModelForCausalLM.from_pretrained(folder)
    tied.config.tie_word_embeddings = False
    head = tied.get_input_embeddings().weight.detach().clone()
    model = type(tied)(tied.config)
    model.load_state_dict(tied.state_dict() | {"lm_head.weight": head})
    with torch.no_grad():
        model.get_input_embeddings().weight[token_id] = math.nan
    model.save_pretrained(folder)
    return folder


def test_documents_whose_logits_are_not_finite_are_left_out_and_the_part_is_completed(tmp_path, poisoned):
    texts = {0: "a fine document", 1: "ends in Z", 2: "Z, from the start", 3: "another fine document", 5: "two segments, one with Z"}
    rows = [(doc_id, 0, text) for doc_id, text in texts.items()] + [(5, 1, "and one without"), (6, 0, "the last, also fine")]
    made = stage(tmp_path, corpus=corpus(tmp_path, rows), model_folder=poisoned)
    content = made.compute(0)
    assert content.data["doc_id_S"].tolist() == [0, 3, 6]
    assert content.attributes["quarantined"] == [{"doc_id": d, "reason": "the model's logits are not finite"} for d in (1, 2, 5)]
    for name in ("nll_S", "entropy_T", "topk_logprobs_TK"):
        assert np.isfinite(content.data[name]).all(), name
    assert made.tokenizer.decode_segments(
        content.data["token_ids_T"], segment_offsets=content.data["segment_offsets"], n_bytes_S=content.data["n_bytes_S"]
    ) == [b"a fine document", b"another fine document", b"the last, also fine"]
    healthy = [row for row in rows if row[0] in {0, 3, 6}]
    alone = stage(tmp_path / "alone", corpus=corpus(tmp_path / "alone", healthy), model_folder=poisoned).compute(0)
    for name, array in alone.data.items():
        terms = model_terms(layers=2, hidden=32, ffn=64, head_dim=8, length=64) + 600 / LANES
        # The tail is the logarithm of what few entries of 600 leave, which is most of it.
        atol = 0 if array.dtype.kind in "iub" else 2 * rounding(np.nan_to_num(array), terms=terms)
        np.testing.assert_allclose(content.data[name].astype(float), array.astype(float), rtol=0, atol=atol, err_msg=name)


def test_a_part_of_which_nothing_is_left_is_empty_and_can_be_committed(tmp_path, poisoned):
    made = stage(tmp_path, corpus=corpus(tmp_path, [(0, 0, "Z"), (1, 0, "y" * 500)]), model_folder=poisoned)
    content = made.compute(0)
    assert content.counts == {"documents": 0, "segments": 0, "tokens": 0, "quarantined": 2}
    made.dataset.commit(0, content=content, seconds=0)
    assert made.dataset.read(0, "topk_ids_TK")[0].shape == (0, 4)
    assert made.dataset.read(0, "segment_offsets")[0].tolist() == [0]
