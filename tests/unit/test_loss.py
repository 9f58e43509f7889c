"""The fusion loss against a dense float64 reference, value and gradient, on one rank and on two that share the vocabulary."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fuseline.train.loss import IGNORED, SoftTargets, fusion_loss

VOCAB, PADDED, POSITIONS, TOPK = 37, 40, 50, 6


def make_case(tail: str | None) -> dict[str, torch.Tensor | None]:
    """Logits with padded columns, ignored labels, repeated ids, padding entries, rows without a target, and masses that do not sum to 1."""
    random = torch.Generator().manual_seed(7)
    topk_ids_NK = torch.randint(0, VOCAB, (POSITIONS, TOPK), generator=random)
    topk_ids_NK[3, :4] = 5
    logprobs_NK = (torch.rand(POSITIONS, TOPK, generator=random) / TOPK).log()
    logprobs_NK[:, -1] = -torch.inf
    logprobs_NK[::5] = -torch.inf
    labels_N = torch.randint(0, VOCAB, (POSITIONS,), generator=random)
    labels_N[::7] = IGNORED
    tail_N = (1 - logprobs_NK.exp().sum(-1)).log()
    soft = tail and SoftTargets.from_logprobs(topk_ids_NK, topk_logprobs_NK=logprobs_NK, tail_logprob_N=tail_N, tail=tail)
    if soft:
        soft.topk_masses_NK[1] *= 0.5
    return {
        "logits": torch.randn(POSITIONS, PADDED, generator=random) * 4,
        "labels": labels_N,
        "ids": soft.topk_ids_NK if soft else None,
        "masses": soft.topk_masses_NK if soft else None,
        "tail_mass": soft.tail_mass_N if soft else None,
        "grad_ce": torch.randn(POSITIONS, generator=random),
        "grad_soft": torch.randn(POSITIONS, generator=random),
    }


def dense(case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses and the gradient in the logits, by autograd over the whole vocabulary in float64."""
    logits_NV = case["logits"].double().requires_grad_()
    logprobs_NV = logits_NV[:, :VOCAB].log_softmax(-1)
    picked_N = logprobs_NV.gather(1, case["labels"].clamp(min=0)[:, None])[:, 0]
    ce_N = torch.where(case["labels"] != IGNORED, -picked_N, 0.0)
    soft_N = torch.zeros_like(ce_N)
    if case["ids"] is not None:
        masses_NV = torch.zeros(POSITIONS, VOCAB, dtype=torch.float64).scatter_add_(1, case["ids"], case["masses"].double())
        soft_N = -(masses_NV * logprobs_NV).sum(-1)
        if case["tail_mass"] is not None:
            tail_N = torch.where(masses_NV > 0, -torch.inf, logprobs_NV).logsumexp(-1)
            soft_N = soft_N - case["tail_mass"].double() * tail_N
    (ce_N @ case["grad_ce"].double() + soft_N @ case["grad_soft"].double()).backward()
    return ce_N.detach(), soft_N.detach(), logits_NV.grad


def sparse(case, *, group=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same by the function under test, with this rank's columns."""
    ranks, rank = (group.size(), group.rank()) if group else (1, 0)
    leaf_NV = case["logits"].chunk(ranks, 1)[rank].clone().requires_grad_()
    soft = None
    if case["ids"] is not None:
        soft = SoftTargets(topk_ids_NK=case["ids"], topk_masses_NK=case["masses"], tail_mass_N=case["tail_mass"])
    ce_N, soft_N = fusion_loss(leaf_NV * 1, labels_N=case["labels"], soft=soft, group=group, vocab_size=VOCAB)
    total = ce_N @ case["grad_ce"]
    if soft_N is not None:
        total = total + soft_N @ case["grad_soft"]
    total.backward()
    return ce_N.detach(), torch.zeros_like(ce_N) if soft_N is None else soft_N.detach(), leaf_NV.grad


def assert_close(found, expected) -> None:
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), reference, atol=5e-6, rtol=1e-6)


@pytest.mark.parametrize("tail", [None, "renormalise", "ghost"])
def test_one_rank_matches_the_dense_reference(tail):
    case = make_case(tail)
    assert_close(sparse(case), dense(case))


def test_two_ranks_match_the_dense_reference(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, __file__, tmp_path], env=environment | {"RANK": str(rank)}) for rank in (0, 1)]
    assert [process.wait(timeout=60) for process in ranks] == [0, 0]
    for tail in (None, "renormalise", "ghost"):
        (ce_N, soft_N, left_NV), (other_ce_N, other_soft_N, right_NV) = (torch.load(tmp_path / f"{tail}-{rank}.pt") for rank in (0, 1))
        assert torch.equal(ce_N, other_ce_N)
        assert torch.equal(soft_N, other_soft_N)
        assert_close((ce_N, soft_N, torch.cat([left_NV, right_NV], 1)), dense(make_case(tail)))


def test_bfloat16_logits_get_a_bfloat16_gradient():
    case = make_case("ghost")
    case["logits"] = case["logits"].bfloat16()
    ce_N, soft_N, grad_NV = sparse(case)
    expected = dense(case)
    assert grad_NV.dtype == torch.bfloat16
    assert_close((ce_N, soft_N), expected[:2])
    torch.testing.assert_close(grad_NV.double(), expected[2], atol=1e-2, rtol=1e-2)


def test_a_tail_that_underflows_stays_finite():
    logits_NV = torch.full((1, 4), -500.0)
    logits_NV[0, 0] = 0
    soft = SoftTargets(topk_ids_NK=torch.tensor([[0]]), topk_masses_NK=torch.tensor([[0.5]]), tail_mass_N=torch.tensor([0.5]))
    leaf_NV = logits_NV.requires_grad_()
    _, soft_N = fusion_loss(leaf_NV * 1, labels_N=torch.tensor([0]), soft=soft, group=None, vocab_size=4)
    soft_N.sum().backward()
    assert soft_N.isfinite().all()
    assert leaf_NV.grad.isfinite().all()


def test_renormalised_masses_sum_to_one_and_empty_rows_to_zero():
    logprobs_NK = torch.tensor([[0.2, 0.3], [0.0, 0.0]]).log().half()
    soft = SoftTargets.from_logprobs(
        torch.zeros(2, 2, dtype=torch.int64), topk_logprobs_NK=logprobs_NK, tail_logprob_N=torch.zeros(2), tail="renormalise"
    )
    torch.testing.assert_close(soft.topk_masses_NK.sum(-1), torch.tensor([1.0, 0.0]))


if __name__ == "__main__":  # one of two ranks
    dist.init_process_group("gloo")
    for name in (None, "renormalise", "ghost"):
        torch.save(sparse(make_case(name), group=dist.group.WORLD), Path(sys.argv[1]) / f"{name}-{dist.get_rank()}.pt")
    dist.destroy_process_group()
