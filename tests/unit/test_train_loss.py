"""The fusion loss against a dense float64 reference, value and gradient; on ranks that share the vocabulary, see the properties."""

import pytest
import torch
from fuseline.train.loss import IGNORED, SoftTargets, fusion_loss
from support.rounding import rounding, stored

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


def sparse(case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same by the function under test."""
    leaf_NV = case["logits"].clone().requires_grad_()
    soft = None
    if case["ids"] is not None:
        soft = SoftTargets(topk_ids_NK=case["ids"], topk_masses_NK=case["masses"], tail_mass_N=case["tail_mass"])
    ce_N, soft_N = fusion_loss(leaf_NV * 1, labels_N=case["labels"], soft=soft, group=None, vocab_size=VOCAB)
    total = ce_N @ case["grad_ce"]
    if soft_N is not None:
        total = total + soft_N @ case["grad_soft"]
    total.backward()
    return ce_N.detach(), torch.zeros_like(ce_N) if soft_N is None else soft_N.detach(), leaf_NV.grad


def assert_close(found, expected, *, logits_NV: torch.Tensor) -> None:
    """Losses, and the gradient, whose weights are those of the losses: a probability has the relative error of its logarithm."""
    of_logprob = 2 * rounding(logits_NV, terms=1) + rounding(1, terms=VOCAB + TOPK)
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), reference, atol=3 * of_logprob, rtol=0)


@pytest.mark.parametrize("tail", [None, "renormalise", "ghost"])
def test_one_rank_matches_the_dense_reference(tail):
    case = make_case(tail)
    assert_close(sparse(case), dense(case), logits_NV=case["logits"])


def test_bfloat16_logits_get_a_bfloat16_gradient():
    case = make_case("ghost")
    case["logits"] = case["logits"].bfloat16()
    ce_N, soft_N, grad_NV = sparse(case)
    expected = dense(case)
    assert grad_NV.dtype == torch.bfloat16
    assert_close((ce_N, soft_N), expected[:2], logits_NV=case["logits"])
    atol = stored(expected[2].abs().max().item(), dtype=torch.bfloat16)
    torch.testing.assert_close(grad_NV.double(), expected[2], atol=1.01 * atol, rtol=0)


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


def test_a_tail_far_below_the_ids_keeps_its_digits():
    """The student's tail is e^-20 of the whole: as a difference of float32 sums it would be 0."""
    logits_NV = torch.tensor([[20.0, 0.0, -1.0, -2.0]])
    soft = SoftTargets(topk_ids_NK=torch.tensor([[0]]), topk_masses_NK=torch.tensor([[0.5]]), tail_mass_N=torch.tensor([0.5]))
    leaf_NV = logits_NV.clone().requires_grad_()
    _, soft_N = fusion_loss(leaf_NV * 1, labels_N=torch.tensor([0]), soft=soft, group=None, vocab_size=4)
    soft_N.sum().backward()
    reference_NV = logits_NV.double().requires_grad_()
    logprobs_NV = reference_NV.log_softmax(-1)
    expected = -0.5 * logprobs_NV[0, 0] - 0.5 * logprobs_NV[0, 1:].logsumexp(0)
    expected.backward()
    torch.testing.assert_close(soft_N[0].double(), expected.detach(), atol=rounding(20, terms=4), rtol=0)
    # The gradient is of the size of the mass, and a share of the tail has the relative error of its logarithm.
    torch.testing.assert_close(leaf_NV.grad.double(), reference_NV.grad, atol=0.5 * rounding(20, terms=4), rtol=0)
