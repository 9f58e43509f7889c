"""The losses equal their dense definitions in float64, value and gradient, for any shape, targets, temperature and weights, and when the
vocabulary is split between ranks; the published trainer's dense targets among them."""

import math
import os
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from fuseline.train.batch import MicroBatch
from fuseline.train.config import TrainingConfig
from fuseline.train.loss import IGNORED, SoftTargets, fusion_loss
from fuseline.train.objective import Objective
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.rounding import rounding


@st.composite
def cases(draw):
    """Logits with padded columns; repeated ids, padding entries, rows without a target, masses that do not sum to 1, ignored labels."""
    vocab, n, k = draw(st.integers(2, 40)), draw(st.integers(1, 12)), draw(st.integers(1, 8))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    masses_NK = torch.rand(n, k, generator=random) * (torch.rand(n, k, generator=random) < draw(st.floats(0, 1)))
    masses_NK = masses_NK / k
    labels_N = torch.randint(0, vocab, (n,), generator=random)
    labels_N[torch.rand(n, generator=random) < draw(st.floats(0, 1))] = IGNORED
    tail = draw(st.booleans())
    return {
        "vocab": vocab,
        "logits": torch.randn(n, vocab + draw(st.integers(0, 5)), generator=random) * draw(st.floats(0.1, 10)),
        "labels": labels_N,
        "soft": SoftTargets(
            topk_ids_NK=torch.randint(0, draw(st.integers(1, vocab)), (n, k), generator=random),
            topk_masses_NK=masses_NK,
            tail_mass_N=1 - masses_NK.sum(-1) if tail else None,
            temperature=1.0 if tail else draw(st.just(1.0) | st.floats(0.3, 5)),
        ),
        "weights": draw(st.none() | st.just(torch.rand(n, generator=random) * 3 + 0.1)),
        "grads": torch.randn(2, n, generator=random),
        "chunk": draw(st.sampled_from([1, 60, 1 << 20])),
    }


def dense_masses(case) -> torch.Tensor:
    soft = case["soft"]
    empty_NV = torch.zeros(len(soft.topk_ids_NK), case["vocab"], dtype=torch.float64)
    return empty_NV.scatter_add_(1, soft.topk_ids_NK, soft.topk_masses_NK.double())


def dense(case, logits_NV):
    """Both losses, and which rows leave the student a tail: where all its ids have mass, it is left to the rule for underflow."""
    soft, T = case["soft"], case["soft"].temperature
    logprobs_NV = logits_NV[:, : case["vocab"]].log_softmax(-1)
    ce_N = torch.where(case["labels"] != IGNORED, -logprobs_NV.gather(1, case["labels"].clamp(min=0)[:, None])[:, 0], 0.0)
    masses_NV = dense_masses(case)
    soft_N = -(T**2) * (masses_NV * (logits_NV[:, : case["vocab"]] / T).log_softmax(-1)).sum(-1)
    has_tail_N = (masses_NV == 0).any(-1)
    if soft.tail_mass_N is not None:
        elsewhere_NV = torch.where(masses_NV > 0, -torch.inf, logprobs_NV)
        tail_N = torch.where(has_tail_N[:, None], elsewhere_NV, 0.0).logsumexp(-1)
        soft_N = soft_N - soft.tail_mass_N.double() * torch.where(has_tail_N, tail_N, 0.0)
    return ce_N, soft_N, has_tail_N


def check(case, *, group=None) -> None:
    """Compare this rank's columns."""
    reference_NV = case["logits"].double().requires_grad_()
    ce_N, soft_N, has_tail_N = dense(case, reference_NV)
    (ce_N @ case["grads"][0].double() + (soft_N * has_tail_N) @ case["grads"][1].double()).backward()
    ranks, rank = (group.size(), group.rank()) if group else (1, 0)
    width = -(-case["logits"].shape[1] // ranks)
    padded_NV = F.pad(case["logits"], (0, width * ranks - case["logits"].shape[1]))
    leaf_NV = padded_NV[:, rank * width : (rank + 1) * width].clone().requires_grad_()
    found_ce_N, found_soft_N = fusion_loss(
        leaf_NV * 1, labels_N=case["labels"], soft=case["soft"], group=group, vocab_size=case["vocab"], chunk_elements=case["chunk"]
    )
    (found_ce_N @ case["grads"][0] + (found_soft_N * has_tail_N) @ case["grads"][1]).backward()
    of_ce, of_soft = errors(case)
    torch.testing.assert_close(found_ce_N.double(), ce_N, atol=of_ce, rtol=0)
    torch.testing.assert_close((found_soft_N * has_tail_N).double(), soft_N * has_tail_N, atol=of_soft, rtol=0)
    expected_NV = F.pad(reference_NV.grad, (0, width * ranks - case["logits"].shape[1]))[:, rank * width : (rank + 1) * width]
    torch.testing.assert_close(leaf_NV.grad.double(), expected_NV, atol=case["grads"].abs().max().item() * (of_ce + of_soft), rtol=0)


def errors(case) -> tuple[float, float]:
    """Of both losses, by rounding. A log-probability is a logit less the logarithm of a sum, which has the sum's relative error; the fusion
    loss is a mean of them over the masses, of logits over the temperature and times its square. The gradient in a logit is a difference of
    probabilities, which have the relative errors of their logarithms, so its error is at most that of the loss."""
    T, n_sums = case["soft"].temperature, case["vocab"] + case["soft"].topk_ids_NK.shape[1]
    of_ce, at_temperature = (2 * rounding(case["logits"] / t, terms=2) + rounding(1, terms=n_sums) for t in (1.0, T))
    return of_ce, 2 * max(T, 1) ** 2 * at_temperature  # twice: of the ids and of the tail beside them


@given(case=cases())
@settings(max_examples=100, deadline=None)
def test_loss_and_gradient_equal_the_dense_definition(case):
    check(case)


def test_ranks_that_share_the_vocabulary_compute_the_same():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}  # with what the tests share
    ranks = [subprocess.Popen([sys.executable, __file__], env=environment | {"RANK": str(rank)}) for rank in (0, 1)]
    assert [process.wait(timeout=60) for process in ranks] == [0, 0]


def micro_batch(case, rows: slice) -> MicroBatch:
    labels_T = case["labels"][rows]
    weights_T = None if case["weights"] is None else case["weights"][rows]
    soft = case["soft"].each(lambda tensor: tensor[rows])
    return MicroBatch(token_ids_T=labels_T, lengths=[len(labels_T)], labels_T=labels_T, soft=soft, weights_T=weights_T)


@given(case=cases(), cut=st.integers(0, 12), kind=st.sampled_from(["ce", "kl"]), start=st.floats(0, 1), end=st.none() | st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_the_objective_is_the_weighted_mean_over_all_micro_batches(case, cut, kind, start, end):
    reference_NV = case["logits"].double().requires_grad_()
    ce_N, soft_N, has_tail_N = dense(case, reference_NV)
    assume(bool(has_tail_N.all()))
    weights_N = torch.ones(len(ce_N)).double() if case["weights"] is None else case["weights"].double()
    masses_NV, soft = dense_masses(case), case["soft"]
    if kind == "kl":
        entropy_N = -torch.xlogy(masses_NV, masses_NV).sum(-1)
        if soft.tail_mass_N is not None:
            entropy_N = entropy_N - torch.xlogy(soft.tail_mass_N, soft.tail_mass_N)
        soft_N = soft_N - soft.temperature**2 * entropy_N
    has_target_N, has_label_N = masses_NV.sum(-1) > 0, case["labels"] != IGNORED
    # A row without masses has no tail either, as `from_logprobs` makes them.
    assume(soft.tail_mass_N is None or bool(has_target_N.all()))
    clm, fusion = (
        (w_N * loss_N).sum() / w_N.sum().clamp(min=1e-9)
        for w_N, loss_N in ((weights_N * has_label_N, ce_N), (weights_N * has_target_N, soft_N))
    )
    steps, step = 5, 2
    clm_weight = start if end is None else (start + end) / 2
    (clm_weight * clm + (1 - clm_weight) * fusion).backward()

    objective = Objective(TrainingConfig(clm_weight=start, clm_weight_end=end, fusion_loss=kind), steps=steps)
    batches = [micro_batch(case, rows) for rows in (slice(0, cut), slice(cut, None)) if len(case["labels"][rows])]
    total_weights = torch.stack([objective.weights(batch) for batch in batches]).sum(0)
    leaf_NV, begin, means, loss = case["logits"].clone().requires_grad_(), 0, torch.zeros(2), 0.0
    for batch in batches:
        rows = slice(begin, begin + len(batch.labels_T))
        losses = fusion_loss((leaf_NV * 1)[rows], labels_N=batch.labels_T, soft=batch.soft, group=None, vocab_size=case["vocab"])
        share, parts = objective.loss(*losses, batch=batch, step=step, total_weights=total_weights)
        share.backward()
        begin, means, loss = rows.stop, means + parts, loss + share.item()
    of_ce, of_soft = errors(case)
    torch.testing.assert_close(means.double(), torch.stack([clm, fusion]).detach(), atol=of_ce + of_soft, rtol=0)
    torch.testing.assert_close(leaf_NV.grad.double(), reference_NV.grad, atol=of_ce + of_soft, rtol=0)
    assert loss == pytest.approx(objective.total(clm=means[0].item(), fusion=means[1].item(), step=step), abs=rounding(means, terms=6))


@given(seed=st.integers(0, 2**31), temperature=st.floats(0.3, 5), tail=st.booleans())
@settings(max_examples=60, deadline=None)
def test_divergence_is_zero_where_the_student_is_the_target_and_never_less(seed, temperature, tail):
    """With repeated ids, whose masses add up, and where the tail is one bucket whatever the student does in it."""
    n, k, vocab, random = 6, 5, 12, torch.Generator().manual_seed(seed)
    logprobs_NK = torch.log_softmax(torch.randn(n, k + 1, generator=random) * 3, -1)
    soft = SoftTargets.from_logprobs(
        torch.randint(0, 9, (n, k), generator=random),
        topk_logprobs_NK=logprobs_NK[:, :k],
        tail_logprob_N=logprobs_NK[:, k],
        tail="ghost" if tail else "renormalise",
        temperature=1.0 if tail else temperature,
    )
    masses_NV = torch.zeros(n, vocab).scatter_add_(1, soft.topk_ids_NK, soft.topk_masses_NK)
    if tail:
        elsewhere_NV = (masses_NV == 0) * torch.rand(n, vocab, generator=random)
        masses_NV = masses_NV + soft.tail_mass_N[:, None] * elsewhere_NV / elsewhere_NV.sum(-1, keepdim=True)
    met_NV, other_NV = masses_NV.clamp(min=1e-12).log() * soft.temperature, torch.randn(n, vocab, generator=random)
    # Its terms are masses times their logarithms, which sum to at most log(vocab), on either side.
    least = rounding(2 * math.log(vocab), terms=vocab + k)
    for logits_NV, largest in ((met_NV, least), (other_NV, torch.inf)):
        _, soft_N = fusion_loss(logits_NV, labels_N=torch.zeros(n, dtype=torch.int64), soft=soft, group=None, vocab_size=vocab)
        divergence_N = soft_N - soft.temperature**2 * soft.entropy_N()
        assert -least * soft.temperature**2 < divergence_N.min()
        assert divergence_N.max() < largest * soft.temperature**2


@given(seed=st.integers(0, 2**31), kind=st.sampled_from(["ce", "kl"]), clm_weight=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_losses_equal_those_of_the_published_dense_targets(seed, kind, clm_weight):
    """FuseLLM (arXiv:2401.10491): full blocks; a target of the logits' shape with renormalised top-k probabilities, or all mass on one
    token; torch's own losses, as means over the positions of a block and then over blocks."""
    n_blocks, length, vocab, k = 3, 8, 30, 5
    random = torch.Generator().manual_seed(seed)
    logits_BLV = torch.randn(n_blocks, length, vocab, generator=random, dtype=torch.float64) * 3
    labels_BL = torch.randint(0, vocab, (n_blocks, length), generator=random)
    ids_BLK = torch.rand(n_blocks, length, vocab, generator=random).argsort(-1)[..., :k]
    logprobs_BLK = torch.log_softmax(torch.randn(n_blocks, length, vocab, generator=random), -1).gather(-1, ids_BLK)
    logprobs_BLK[:, ::3] = torch.tensor([0.0] + [-torch.inf] * (k - 1))

    reference_BLV = logits_BLV.clone().requires_grad_()
    target_BLV = torch.zeros_like(logits_BLV).scatter_(-1, ids_BLK, logprobs_BLK.double().softmax(-1))
    blocks = []
    for logits_LV, labels_L, target_LV in zip(reference_BLV, labels_BL, target_BLV, strict=True):
        clm = F.cross_entropy(logits_LV, labels_L)
        if kind == "ce":
            fusion = F.cross_entropy(logits_LV, target_LV)
        else:
            fusion = F.kl_div(logits_LV.log_softmax(-1), target_LV, reduction="batchmean")
        blocks.append(clm_weight * clm + (1 - clm_weight) * fusion)
    expected = torch.stack(blocks).mean()
    expected.backward()

    soft = SoftTargets.from_logprobs(
        ids_BLK.flatten(0, 1), topk_logprobs_NK=logprobs_BLK.flatten(0, 1), tail_logprob_N=torch.zeros(24), tail="renormalise"
    )
    labels_T = labels_BL.flatten()
    batch = MicroBatch(token_ids_T=labels_T, lengths=[length] * n_blocks, labels_T=labels_T, soft=soft)
    leaf_NV = logits_BLV.flatten(0, 1).float().requires_grad_()
    losses = fusion_loss(leaf_NV * 1, labels_N=labels_T, soft=soft, group=None, vocab_size=vocab)
    objective = Objective(TrainingConfig(clm_weight=clm_weight, fusion_loss=kind), steps=1)
    loss, _ = objective.loss(*losses, batch=batch, step=0, total_weights=objective.weights(batch))
    loss.backward()
    of_logprob = 2 * rounding(leaf_NV.detach(), terms=1) + rounding(1, terms=vocab + k)
    assert loss.item() == pytest.approx(expected.item(), abs=of_logprob)
    torch.testing.assert_close(leaf_NV.grad.double(), reference_BLV.grad.flatten(0, 1), atol=2 * of_logprob / len(labels_T), rtol=0)


if __name__ == "__main__":  # one of two ranks; both draw the same examples
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))

    @given(case=cases())
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    def on_both(case):
        check(case, group=dist.group.WORLD)

    on_both()
    dist.destroy_process_group()
