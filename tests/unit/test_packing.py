"""Packs hold every token once and depend on nothing but the offsets and the seed; batches carry the right labels and targets."""

import numpy as np
import pytest
import torch
from fuseline.store.dataset import Dataset, PartContent
from fuseline.store.errors import DataError
from fuseline.train.config import TrainingConfig
from fuseline.train.data import TargetsData, prefetched
from fuseline.train.loss import IGNORED
from fuseline.train.packing import pack_epoch

VOCAB, TOPK, LENGTH = 50, 4, 32


def make_offsets(parts: int = 7) -> dict[int, np.ndarray]:
    random = np.random.default_rng(0)
    return {part: np.concatenate([[0], random.integers(1, 3 * LENGTH, 40).cumsum()]) for part in range(10, 10 + parts)}


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    """Targets that tell where they are from: token t of a part is t % VOCAB, and its distribution has the next token on top."""
    dataset = Dataset.create(tmp_path / "targets", identity={"targets": "test"})
    for part, offsets in make_offsets().items():
        n = int(offsets[-1])
        token_ids_T = np.arange(n) % VOCAB
        arrays = {
            "token_ids_T": token_ids_T.astype(np.uint16),
            "segment_offsets": offsets.astype(np.int64),
            "topk_ids_TK": ((token_ids_T[:, None] + 1 + np.arange(TOPK)) % VOCAB).astype(np.uint16),
            "topk_logprobs_TK": np.tile([np.log(0.4), np.log(0.2), np.log(0.1), -np.inf], (n, 1)).astype(np.float16),
            "tail_logprob_T": np.full(n, np.log(0.3), np.float16),
        }
        dataset.commit(part, content=PartContent(data=arrays, counts={"tokens": n}), seconds=0.0)
    return dataset


def make_data(dataset, **settings) -> TargetsData:
    config = TrainingConfig(**{"sequence_length": LENGTH, "global_batch_size": 8, "seed": 3} | settings)
    return TargetsData(dataset, parts=dataset.parts(), vocab_size=VOCAB, config=config)


def test_every_token_is_packed_once_in_whole_pieces():
    offsets = make_offsets()
    packs = pack_epoch(offsets, sequence_length=LENGTH, seed=0, epoch=0)
    seen = {part: np.zeros(ends[-1], int) for part, ends in offsets.items()}
    for number in range(len(packs)):
        pieces = packs[number]
        assert 0 < sum(piece.length for piece in pieces) <= LENGTH
        for piece in pieces:
            first, end = offsets[piece.part][piece.segment : piece.segment + 2]
            assert first <= piece.start < piece.start + piece.length <= end
            assert piece.length == LENGTH or piece.start + piece.length >= end - 1
            assert piece.ends_segment == (piece.start + piece.length == end)
            seen[piece.part][piece.start : piece.start + piece.length] += 1
    for part, ends in offsets.items():
        # A last token that would be a piece by itself predicts nothing: it is left out, and is the label of the piece before.
        alone = ends[1:][np.diff(ends) % LENGTH == 1] - 1
        seen[part][alone] += 1
        assert (seen[part] == 1).all()


def test_packs_are_nearly_full():
    random = np.random.default_rng(1)
    offsets = {0: np.concatenate([[0], random.integers(20, 600, 5000).cumsum()])}
    packs = pack_epoch(offsets, sequence_length=2048, seed=0, epoch=0)
    assert offsets[0][-1] / (len(packs) * 2048) > 0.99


def test_order_is_a_function_of_seed_and_epoch():
    def order(**which):
        packs = pack_epoch(make_offsets(), sequence_length=LENGTH, **which)
        return [packs[number] for number in range(len(packs))]

    assert order(seed=0, epoch=0) == order(seed=0, epoch=0)
    assert order(seed=0, epoch=0) != order(seed=0, epoch=1)
    assert order(seed=0, epoch=0) != order(seed=1, epoch=0)


@pytest.mark.parametrize("data_parallel", [2, 4])
def test_ranks_share_out_the_same_batches(dataset, data_parallel):
    alone, shared = make_data(dataset), make_data(dataset, data_parallel=data_parallel)
    assert alone.steps == shared.steps
    for step in (0, alone.steps - 1):
        whole = alone.micro_batches(step, data_rank=0)
        dealt = [batch for rank in range(data_parallel) for batch in shared.micro_batches(step, data_rank=rank)]
        assert len(whole) == len(dealt) == 8
        for mine, other in zip(whole, dealt, strict=True):
            assert torch.equal(mine.token_ids_T, other.token_ids_T)
            assert torch.equal(mine.soft.topk_masses_NK, other.soft.topk_masses_NK)


def test_micro_batches_join_packs(dataset):
    single, double = make_data(dataset), make_data(dataset, micro_batch_size=2)
    first, second = single.micro_batches(0, data_rank=0)[:2]
    joined = double.micro_batches(0, data_rank=0)[0]
    assert torch.equal(joined.token_ids_T, torch.cat([first.token_ids_T, second.token_ids_T]))
    assert joined.lengths == [*first.lengths, *second.lengths]


@pytest.mark.parametrize("tail", ["renormalise", "ghost"])
def test_labels_and_targets_are_about_the_next_token_of_the_segment(dataset, tail):
    data = make_data(dataset, tail=tail)
    pieces = [piece for pack in data.packs(0) for piece in pack]
    batches = data.micro_batches(0, data_rank=0)
    token_ids_T, labels_T = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("token_ids_T", "labels_T"))
    masses_TK = torch.cat([batch.soft.topk_masses_NK for batch in batches])
    ids_TK = torch.cat([batch.soft.topk_ids_NK for batch in batches])
    ends = torch.tensor([piece.length for piece in pieces]).cumsum(0) - 1
    is_end_T = torch.zeros(len(labels_T), dtype=torch.bool)
    is_end_T[ends[[piece.ends_segment for piece in pieces]]] = True
    assert (labels_T[is_end_T] == IGNORED).all()
    assert torch.equal(labels_T[~is_end_T], (token_ids_T[~is_end_T] + 1) % VOCAB)
    assert torch.equal(ids_TK[~is_end_T, 0], labels_T[~is_end_T])
    assert (masses_TK[is_end_T] == 0).all()
    expected_T = torch.full((int((~is_end_T).sum()),), 1.0 if tail == "renormalise" else 0.7)
    torch.testing.assert_close(masses_TK[~is_end_T].sum(-1), expected_T, atol=1e-3, rtol=0)
    if tail == "ghost":
        tail_T = torch.cat([batch.soft.tail_mass_N for batch in batches])
        torch.testing.assert_close(tail_T, torch.where(is_end_T, 0.0, 0.3), atol=1e-3, rtol=0)


def test_epochs_follow_each_other_and_the_last_batch_is_full(dataset):
    data = make_data(dataset, epochs=2)
    packs = [pack for step in range(data.steps) for pack in data.packs(step)]
    epochs = [pack_epoch(make_offsets(), sequence_length=LENGTH, seed=3, epoch=epoch) for epoch in range(3)]
    assert packs == [epoch[number] for epoch in epochs for number in range(len(epoch))][: data.steps * 8]
    assert len(epochs[0]) + len(epochs[1]) <= len(packs) < len(epochs[0]) + len(epochs[1]) + 8


def test_a_batch_larger_than_an_epoch_goes_on_into_the_next(dataset):
    data = make_data(dataset, global_batch_size=500, steps=1)
    assert len(data.packs(0)) == 500


def test_pure_next_token_training_reads_no_distributions(dataset):
    batch = make_data(dataset, clm_weight=1.0).micro_batches(0, data_rank=0)[0]
    assert batch.soft is None


def test_an_id_beyond_the_vocabulary_is_refused(dataset):
    data = TargetsData(dataset, parts=dataset.parts(), vocab_size=20, config=TrainingConfig(sequence_length=LENGTH, global_batch_size=8))
    with pytest.raises(DataError, match=r"token id \(\d+\) of part \d+ must be below the model's vocab_size \(20\)"):
        data.micro_batches(0, data_rank=0)


def test_an_absent_part_is_named(dataset):
    with pytest.raises(DataError, match="has no part 99"):
        TargetsData(dataset, parts=[10, 99], vocab_size=VOCAB, config=TrainingConfig())


def test_prefetching_keeps_the_order_and_raises_what_reading_raises():
    assert list(prefetched(lambda step: step * 2, range(3, 7))) == [6, 8, 10, 12]
    with pytest.raises(ZeroDivisionError):
        list(prefetched(lambda step: 1 // step, range(2)))
