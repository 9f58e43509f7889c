"""The fusion loss equals its dense definition for any shape, targets and incoming gradient."""

import torch
from fuseline.train.loss import IGNORED, SoftTargets, fusion_loss
from hypothesis import given, settings
from hypothesis import strategies as st


@st.composite
def cases(draw):
    vocab, n, k = draw(st.integers(2, 40)), draw(st.integers(1, 12)), draw(st.integers(1, 8))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    masses_NK = torch.rand(n, k, generator=random) * (torch.rand(n, k, generator=random) < draw(st.floats(0, 1)))
    masses_NK = masses_NK / k
    labels_N = torch.randint(0, vocab, (n,), generator=random)
    labels_N[torch.rand(n, generator=random) < draw(st.floats(0, 1))] = IGNORED
    return {
        "vocab": vocab,
        "logits": torch.randn(n, vocab + draw(st.integers(0, 5)), generator=random) * draw(st.floats(0.1, 10)),
        "labels": labels_N,
        "ids": torch.randint(0, vocab, (n, k), generator=random),
        "masses": masses_NK,
        "tail": draw(st.none() | st.just(1 - masses_NK.sum(-1))),
        "grads": torch.randn(2, n, generator=random),
    }


def dense(case, logits_NV):
    logprobs_NV = logits_NV[:, : case["vocab"]].log_softmax(-1)
    ce_N = torch.where(case["labels"] != IGNORED, -logprobs_NV.gather(1, case["labels"].clamp(min=0)[:, None])[:, 0], 0.0)
    masses_NV = torch.zeros_like(logprobs_NV).scatter_add_(1, case["ids"], case["masses"].double())
    soft_N = -(masses_NV * logprobs_NV).sum(-1)
    if case["tail"] is not None:
        elsewhere_NV = torch.where(masses_NV > 0, -torch.inf, logprobs_NV)
        has_tail_N = (masses_NV == 0).any(-1)  # else the student has no tail to give mass to: left to the underflow rule
        tail_N = torch.where(has_tail_N[:, None], elsewhere_NV, 0.0).logsumexp(-1)
        soft_N = soft_N - case["tail"].double() * torch.where(has_tail_N, tail_N, 0.0)
    return ce_N, soft_N, (masses_NV == 0).any(-1)


@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_loss_and_gradient_equal_the_dense_definition(case):
    reference_NV = case["logits"].double().requires_grad_()
    ce_N, soft_N, has_tail_N = dense(case, reference_NV)
    (ce_N @ case["grads"][0].double() + (soft_N * has_tail_N) @ case["grads"][1].double()).backward()
    leaf_NV = case["logits"].clone().requires_grad_()
    soft = SoftTargets(topk_ids_NK=case["ids"], topk_masses_NK=case["masses"], tail_mass_N=case["tail"])
    found_ce_N, found_soft_N = fusion_loss(leaf_NV * 1, labels_N=case["labels"], soft=soft, group=None, vocab_size=case["vocab"])
    (found_ce_N @ case["grads"][0] + (found_soft_N * has_tail_N) @ case["grads"][1]).backward()
    torch.testing.assert_close(found_ce_N.double(), ce_N, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((found_soft_N * has_tail_N).double(), soft_N * has_tail_N, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(leaf_NV.grad.double(), reference_NV.grad, atol=2e-5, rtol=1e-5)
