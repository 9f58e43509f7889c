"""Batches carry the right tokens, labels, targets and weights, whoever reads them and wherever reading begins."""

import re

import numpy as np
import pytest
import torch
from fuseline.store.corpus_plan import Domains
from fuseline.store.dataset import Dataset, PartContent, as_ranges
from fuseline.store.errors import DataError, UsageError
from fuseline.train.config import TrainingConfig
from fuseline.train.data import PREFETCHED_STEPS, TargetsData, prefetched
from fuseline.train.loss import IGNORED
from fuseline.train.order import BLOCK_ROWS, BUFFER_BLOCKS, PackOrder, SegmentIndex

VOCAB, TOPK, LENGTH = 50, 4, 32


def make_offsets(parts: int = 7) -> dict[int, np.ndarray]:
    random = np.random.default_rng(0)
    return {part: np.concatenate([[0], random.integers(1, 3 * LENGTH, 40).cumsum()]) for part in range(10, 10 + parts)}


def write(folder, offsets, **more) -> Dataset:
    """Targets that tell where they are from: token t of a part is t % VOCAB, and its distribution has the next token on top."""
    dataset = Dataset.create(folder, identity={"targets": "test"})
    for part, ends in offsets.items():
        n = int(ends[-1])
        token_ids_T = np.arange(n) % VOCAB
        arrays = {
            "token_ids_T": token_ids_T.astype(np.uint16),
            "segment_offsets": ends.astype(np.int64),
            "topk_ids_TK": ((token_ids_T[:, None] + 1 + np.arange(TOPK)) % VOCAB).astype(np.uint16),
            "topk_logprobs_TK": np.tile([np.log(0.4), np.log(0.2), np.log(0.1), -np.inf], (n, 1)).astype(np.float16),
            "tail_logprob_T": np.full(n, np.log(0.3), np.float16),
            **{name: make(ends) for name, make in more.items()},
        }
        dataset.commit(part, content=PartContent(data=arrays, counts={"tokens": n}), seconds=0.0)
    return dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return write(tmp_path_factory.mktemp("targets"), make_offsets())


def make_data(dataset, *, domains=None, **settings) -> TargetsData:
    config = TrainingConfig(**{"sequence_length": LENGTH, "global_batch_size": 8, "seed": 3} | settings)
    return TargetsData(dataset, parts=dataset.parts(), vocab_size=VOCAB, config=config, domains=domains)


def joined(batches, name: str) -> torch.Tensor:
    return torch.cat([getattr(batch, name) for batch in batches])


# ---- the order ---------------------------------------------------------------------------------------------------------------------------


def make_order(offsets, *, seed=0, packing="isolated", sequence_length=LENGTH) -> PackOrder:
    return PackOrder(SegmentIndex.of(offsets), packing=packing, sequence_length=sequence_length, seed=seed)


def listed(packs) -> list[tuple]:
    pieces = list(zip(*(getattr(packs, name).tolist() for name in ("block_P", "segment_P", "start_P", "length_P")), strict=True))
    return [tuple(pieces[first:stop]) for first, stop in zip(packs.offsets_N1, packs.offsets_N1[1:], strict=False)]


@pytest.mark.parametrize("packing", ["isolated", "concatenated"])
def test_packs_are_nearly_full(packing):
    """Of segments as short texts are, and of some that are longer than a pack."""
    random = np.random.default_rng(1)
    lengths = np.maximum(1, random.lognormal(6, 1, 5000).astype(int))
    order = make_order({0: np.concatenate([[0], lengths.cumsum()])}, packing=packing, sequence_length=2048)
    assert lengths.sum() / (order.n_packs(0) * 2048) > 0.998


@pytest.mark.parametrize("packing", ["isolated", "concatenated"])
def test_order_is_a_function_of_seed_and_epoch_and_begins_anywhere(packing):
    offsets = make_offsets(parts=2 * BUFFER_BLOCKS + 5)  # three buffers
    order = make_order(offsets, packing=packing)
    first, second = order.n_packs(0), order.n_packs(0) + order.n_packs(1)
    whole = listed(order.packs(0, second))
    assert whole == listed(make_order(offsets, packing=packing).packs(0, second))
    assert sorted(whole[:first]) != sorted(whole[first:])
    assert whole[:first] != listed(make_order(offsets, packing=packing, seed=1).packs(0, second))[:first]
    for begin in (0, first // 2, first - 1, first, first + 3, second - 1):
        fresh = make_order(offsets, packing=packing)
        assert listed(fresh.packs(begin, min(second, begin + 5))) == whole[begin : begin + 5]


def test_packs_of_many_parts_are_mixed():
    """The packs of one buffer are of as many parts as it has blocks, and the order of parts is another in each buffer."""
    order = make_order(make_offsets(parts=4 * BUFFER_BLOCKS))
    packs = order.packs(0, order.n_packs(0) // 4)
    parts = order.index.part_B[packs.block_P]
    assert len(np.unique(parts)) == BUFFER_BLOCKS
    assert len(np.unique(parts[:40])) > BUFFER_BLOCKS // 2


def test_a_large_part_is_several_blocks(tmp_path):
    random = np.random.default_rng(2)
    ends = np.concatenate([[0], random.integers(100, 1000, 500).cumsum()])
    dataset = write(tmp_path / "large", {3: ends})
    data = make_data(dataset, sequence_length=256)
    assert len(data.index.part_B) == -(-ends[-1] // BLOCK_ROWS) > 1
    seen = np.zeros(VOCAB, int)
    for step in range(data.steps):
        batches = data.micro_batches(step, data_rank=0)
        for token_ids_T in joined(batches, "token_ids_T").split([n for batch in batches for n in batch.lengths]):
            assert ((token_ids_T.diff() % VOCAB) == 1).all()
        seen += np.bincount(joined(batches, "token_ids_T"), minlength=VOCAB)
    assert seen.sum() >= ends[-1] - 500


# ---- ranks and batches -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["isolated", "concatenated"])
@pytest.mark.parametrize("data_parallel", [2, 4])
def test_ranks_share_out_the_same_batches(dataset, data_parallel, packing):
    alone, shared = make_data(dataset, packing=packing), make_data(dataset, packing=packing, data_parallel=data_parallel)
    assert alone.steps == shared.steps
    for step in (0, alone.steps - 1):
        whole = alone.micro_batches(step, data_rank=0)
        dealt = [batch for rank in range(data_parallel) for batch in shared.micro_batches(step, data_rank=rank)]
        assert len(whole) == len(dealt) == 8
        for mine, other in zip(whole, dealt, strict=True):
            assert torch.equal(mine.token_ids_T, other.token_ids_T)
            assert torch.equal(mine.labels_T, other.labels_T)
            assert torch.equal(mine.soft.topk_masses_NK, other.soft.topk_masses_NK)


@pytest.mark.parametrize("packing", ["isolated", "concatenated"])
def test_micro_batches_join_packs(dataset, packing):
    single, double = make_data(dataset, packing=packing), make_data(dataset, packing=packing, micro_batch_size=2)
    first, second = single.micro_batches(0, data_rank=0)[:2]
    both = double.micro_batches(0, data_rank=0)[0]
    assert torch.equal(both.token_ids_T, torch.cat([first.token_ids_T, second.token_ids_T]))
    assert torch.equal(both.soft.topk_ids_NK, torch.cat([first.soft.topk_ids_NK, second.soft.topk_ids_NK]))
    assert both.lengths == [*first.lengths, *second.lengths]


def test_a_batch_is_the_same_whatever_was_read_before(dataset):
    data = make_data(dataset)
    in_order = [joined(data.micro_batches(step, data_rank=0), "token_ids_T") for step in range(data.steps)]
    backwards = make_data(dataset)
    for step in reversed(range(data.steps)):
        assert torch.equal(joined(backwards.micro_batches(step, data_rank=0), "token_ids_T"), in_order[step])


def test_epochs_follow_each_other_and_the_last_batch_is_full(dataset):
    once, data = make_data(dataset), make_data(dataset, epochs=2)
    packs = [pack for step in range(data.steps) for pack in data.packs(step)]
    n_packs = [once._order.n_packs(epoch) for epoch in range(2)]
    assert sum(n_packs) <= len(packs) < sum(n_packs) + 8
    for first, stop in ((0, n_packs[0]), (n_packs[0], sum(n_packs))):
        tokens = {}
        for piece in (piece for pack in packs[first:stop] for piece in pack):
            tokens[piece.part, piece.segment] = tokens.get((piece.part, piece.segment), 0) + piece.length
        expected = {(part, s): n for part, ends in make_offsets().items() for s, n in enumerate(np.diff(ends).tolist())}
        assert tokens == {which: n - (n % LENGTH == 1) for which, n in expected.items() if n > 1}


def test_a_batch_larger_than_an_epoch_goes_on_into_the_next(dataset):
    data = make_data(dataset, global_batch_size=500, steps=1)
    assert len(data.packs(0)) == 500


# ---- labels, targets, weights ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", ["renormalise", "ghost"])
def test_labels_and_targets_are_about_the_next_token_of_the_segment(dataset, tail):
    data = make_data(dataset, tail=tail)
    batches = data.micro_batches(0, data_rank=0)
    token_ids_T, labels_T = (joined(batches, name) for name in ("token_ids_T", "labels_T"))
    masses_TK = torch.cat([batch.soft.topk_masses_NK for batch in batches])
    ids_TK = torch.cat([batch.soft.topk_ids_NK for batch in batches])
    ends_T = ends_of_segments(data, step=0)
    assert (labels_T[ends_T] == IGNORED).all()
    assert torch.equal(labels_T[~ends_T], (token_ids_T[~ends_T] + 1) % VOCAB)
    assert torch.equal(ids_TK[~ends_T, 0], labels_T[~ends_T])
    assert (masses_TK[ends_T] == 0).all()
    expected_T = torch.full((int((~ends_T).sum()),), 1.0 if tail == "renormalise" else 0.7)
    torch.testing.assert_close(masses_TK[~ends_T].sum(-1), expected_T, atol=1e-3, rtol=0)
    if tail == "ghost":
        tail_T = torch.cat([batch.soft.tail_mass_N for batch in batches])
        torch.testing.assert_close(tail_T, torch.where(ends_T, 0.0, 0.3), atol=1e-3, rtol=0)


def ends_of_segments(data, *, step: int) -> torch.Tensor:
    packs = data._packs(step)
    ends_T = torch.zeros(int(packs.length_P.sum()), dtype=torch.bool)
    ends_T[torch.from_numpy(np.cumsum(packs.length_P)[packs.ends_segment_P] - 1)] = True
    assert 0 < ends_T.sum() < len(ends_T)
    return ends_T


def test_concatenated_packs_are_one_text_whose_joins_have_a_label_and_no_target(dataset):
    data = make_data(dataset, packing="concatenated")
    batches = data.micro_batches(0, data_rank=0)
    assert all(len(batch.lengths) == 1 for batch in batches)
    assert {batch.lengths[0] for batch in batches[:-1]} == {LENGTH}
    ends_T = ends_of_segments(data, step=0)
    is_last_T = torch.zeros_like(ends_T)
    is_last_T[torch.tensor([len(batch.token_ids_T) for batch in batches]).cumsum(0) - 1] = True
    token_ids_T, labels_T = (joined(batches, name) for name in ("token_ids_T", "labels_T"))
    following_T = torch.where(is_last_T & ~ends_T, (token_ids_T + 1) % VOCAB, token_ids_T.roll(-1))
    assert torch.equal(labels_T, torch.where(is_last_T & ends_T, IGNORED, following_T))
    masses_TK = torch.cat([batch.soft.topk_masses_NK for batch in batches])
    assert torch.equal(masses_TK.sum(-1) == 0, ends_T)


def third_of_positions(ends: np.ndarray) -> np.ndarray:
    """A label mask with a label at the first position of every piece, so that none is left out."""
    places_T = np.arange(ends[-1]) - np.repeat(ends[:-1], np.diff(ends))
    return ((np.arange(ends[-1]) % 3 == 0) | (places_T % LENGTH == 0)).astype(np.uint8)


def test_masked_positions_have_neither_label_nor_target(tmp_path):
    offsets = {part: np.cumsum([0, *np.maximum(2, np.diff(ends))]) for part, ends in make_offsets(parts=2).items()}
    masked = write(tmp_path / "masked", offsets, label_mask_T=third_of_positions)
    plain = write(tmp_path / "plain", offsets)
    for packing in ("isolated", "concatenated"):
        batches = make_data(masked, packing=packing).micro_batches(0, data_rank=0)
        others = make_data(plain, packing=packing).micro_batches(0, data_rank=0)
        # Tokens count modulo VOCAB, so its id does not give the place of a token; what is masked is seen at both labels and targets.
        labels_T, other_T = joined(batches, "labels_T"), joined(others, "labels_T")
        assert torch.equal(joined(batches, "token_ids_T"), joined(others, "token_ids_T"))
        assert ((labels_T == other_T) | (labels_T == IGNORED)).all()
        assert 0.25 < (labels_T != IGNORED).float().mean() < 0.5
        has_target_T, had_target_T = (torch.cat([batch.soft.is_known_N() for batch in each]) for each in (batches, others))
        assert torch.equal(has_target_T, (labels_T != IGNORED) & had_target_T)


def only_some_segments(ends: np.ndarray) -> np.ndarray:
    """A label mask of which seven segments in eight have no label."""
    return np.repeat(np.arange(len(ends) - 1) % 8 == 0, np.diff(ends)).astype(np.uint8)


@pytest.mark.parametrize("packing", ["isolated", "concatenated"])
def test_segments_without_labels_are_left_out_and_every_step_has_labels(tmp_path, packing):
    offsets = make_offsets(parts=2)
    dataset = write(tmp_path / "targets", offsets, label_mask_T=only_some_segments)
    data = make_data(dataset, packing=packing, global_batch_size=1)
    n_segments = sum(len(ends) - 1 for ends in offsets.values())
    with_labels = {(part, s) for part, ends in offsets.items() for s in range(0, len(ends) - 1, 8) if ends[s + 1] - ends[s] > 1}
    assert data.reading.without_labels == n_segments - len(with_labels)
    seen = set()
    for step in range(data.steps):
        assert (joined(data.micro_batches(step, data_rank=0), "labels_T") != IGNORED).any()
        seen |= {(piece.part, piece.segment) for pack in data.packs(step) for piece in pack}
    assert seen == with_labels
    remark = f"{n_segments - len(with_labels):,} of {n_segments:,} segments have no token to learn and are left out"
    assert remark in list(data.reading.remarks())
    assert data.identity == {"segments_without_labels": n_segments - len(with_labels)}


def test_only_what_is_left_out_makes_another_training(tmp_path):
    """Checkpoints of trainings whose data has labels everywhere go on."""
    offsets = {0: np.cumsum([0, 20, 2 * LENGTH, 30])}
    masks = {
        "plain": {},
        "all": {"label_mask_T": lambda ends: np.ones(ends[-1], np.uint8)},
        "a piece without": {"label_mask_T": lambda ends: (np.arange(ends[-1]) < 20 + LENGTH).astype(np.uint8)},
    }
    found = {name: make_data(write(tmp_path / name, offsets, **mask), global_batch_size=1) for name, mask in masks.items()}
    assert {name: data.identity for name, data in found.items()} == {
        "plain": {},
        "all": {},
        "a piece without": {"segments_without_labels": 1},
    }
    assert {name: data.reading.tokens_left_out for name, data in found.items()} == {"plain": 0, "all": 0, "a piece without": LENGTH + 30}


def test_data_without_any_label_is_refused(tmp_path):
    dataset = write(tmp_path / "targets", make_offsets(parts=2), label_mask_T=lambda ends: np.zeros(ends[-1], np.uint8))
    with pytest.raises(DataError, match=r"its \d+ segments have no token to learn.* corpus\.context_length may be too short"):
        make_data(dataset)


@pytest.mark.parametrize(
    ("settings", "remark"),
    [
        ({"global_batch_size": 5}, None),
        ({"global_batch_size": 40}, r"has 10 sequences, but a step takes 40: each step reads every document 4\.0 times\. Lower "),
        ({"global_batch_size": 2, "steps": 50}, r"50 steps of 2 sequences read the corpus \(10 sequences\) 10\.0 times"),
        ({"global_batch_size": 2, "steps": 5}, None),
        (
            {"global_batch_size": 8, "epochs": 1},
            r"epochs have 10 sequences, but 2 steps of 8 read 16: 6 sequences are read one extra time\. Lower",
        ),
        ({"global_batch_size": 8, "epochs": 4}, None),
    ],
)
def test_how_often_a_training_reads_its_corpus_is_reported(tmp_path, settings, remark):
    dataset = write(tmp_path / "targets", {0: np.arange(11) * LENGTH})
    remarks = list(make_data(dataset, **settings).reading.remarks())
    assert [bool(re.search(remark or "never", said)) for said in remarks] == [True] * (remark is not None)


def test_positions_weigh_what_the_domain_of_their_document_does(tmp_path):
    offsets = make_offsets(parts=3)
    dataset = write(tmp_path / "weighed", offsets, doc_id_S=lambda ends: np.arange(len(ends) - 1) // 4)
    domains = Domains(["code", "law", "news"], (np.arange(10) % 3).astype(np.int32))
    data = make_data(dataset, domains=domains, domain_weights={"code": 3.0, "news": 0.5})
    batches, packs = data.micro_batches(1, data_rank=0), data.packs(1)
    for batch, pack in zip(batches, packs, strict=True):
        expected = [[3.0, 1.0, 0.5][piece.segment // 4 % 3] for piece in pack for _ in range(piece.length)]
        assert batch.weights_T.tolist() == expected
    with pytest.raises(UsageError, match=r"training\.domain_weights: prose must be domains of the corpus: code, law, news\."):
        make_data(dataset, domains=domains, domain_weights={"prose": 2.0})


def test_pure_next_token_training_reads_no_distributions(dataset):
    assert make_data(dataset, clm_weight=1.0).micro_batches(0, data_rank=0)[0].soft is None
    assert make_data(dataset, clm_weight=1.0, clm_weight_end=0.5).micro_batches(0, data_rank=0)[0].soft is not None


@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
def test_wide_ids_and_q8_are_read_as_what_they_mean(tmp_path, kind):
    dataset = Dataset.create(tmp_path / "wide", identity={"targets": "wide"})
    ids_TK = (np.arange(60)[:, None] * 3 + np.arange(2)).astype(kind)
    arrays = {
        "token_ids_T": np.arange(60).astype(kind),
        "segment_offsets": np.array([0, 60]),
        "topk_ids_TK": ids_TK + kind(60_000),
        "topk_logprobs_TK": np.tile(np.log([0.5, 0.25]), (60, 1)),
        "tail_logprob_T": np.full(60, np.log(0.25)),
    }
    encodings = {"topk_logprobs_TK": "q8", "tail_logprob_T": "q8"}
    dataset.commit(0, content=PartContent(data=arrays, counts={"tokens": 60}, encodings=encodings), seconds=0.0)
    config = TrainingConfig(sequence_length=64, global_batch_size=1)
    (batch,) = TargetsData(dataset, parts=[0], vocab_size=70_000, config=config).micro_batches(0, data_rank=0)
    assert np.array_equal(batch.soft.topk_ids_NK.numpy(), ids_TK.astype(np.int64) + 60_000)
    torch.testing.assert_close(batch.soft.topk_masses_NK[:-1], torch.tensor([[0.5, 0.25]]).expand(59, 2), atol=0.01, rtol=0)


# ---- errors and prefetching --------------------------------------------------------------------------------------------------------------


def test_an_id_beyond_the_vocabulary_is_refused(dataset):
    data = TargetsData(dataset, parts=dataset.parts(), vocab_size=20, config=TrainingConfig(sequence_length=LENGTH, global_batch_size=8))
    with pytest.raises(DataError, match=r"token id \(\d+\) of part 1\d must be below the model's vocab_size \(20\)"):
        data.micro_batches(0, data_rank=0)


def test_missing_parts_are_named_as_ranges(dataset):
    with pytest.raises(DataError, match=r"lacks 4 of the 6 parts to train on \(97-99, 101\)\. Run the recipe again\."):
        TargetsData(dataset, parts=[10, 11, 97, 98, 99, 101], vocab_size=VOCAB, config=TrainingConfig())
    assert as_ranges([12, 3, 4, 6, 7, 5]) == "3-7, 12"
    assert as_ranges([]) == ""


def test_segments_of_one_token_are_nothing_to_train_on(tmp_path):
    dataset = write(tmp_path / "short", {0: np.arange(9)})
    with pytest.raises(DataError, match="has no segment of two tokens or more"):
        make_data(dataset)


def test_prefetching_keeps_the_order_is_bounded_and_raises_what_reading_raises():
    assert list(prefetched(lambda step: step * 2, range(3, 12))) == [*range(6, 24, 2)]
    assert list(prefetched(lambda step: step, range(0))) == []
    read = []
    batches = prefetched(lambda step: read.append(step) or step, range(100))
    assert next(batches) == 0
    batches.close()  # waits for what is being read
    assert len(read) <= 1 + PREFETCHED_STEPS
    with pytest.raises(ZeroDivisionError):
        list(prefetched(lambda step: 1 // step, range(2)))
