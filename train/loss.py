"""Next-token and fused-target cross-entropy over a vocabulary that is split across tensor-parallel ranks.

Axes: N positions, V columns of the vocabulary on this rank, K stored entries of a target distribution.

The dense target (N, V) is never built: the gradient in the logits is a multiple of the student's own softmax, corrected at the K stored
ids. Both losses together cost one MAX all-reduce of N numbers and one SUM all-reduce of at most 4 N, whatever K and V are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # label of a position whose next token is not known
_CHUNK_ELEMENTS = 1 << 20  # logits worked on at a time: 4 MB of float32; 1.4 times as fast as 16 MB on 2 cores


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftTargets:
    """Fused next-token distributions of N positions; a position without one has only zero masses."""

    topk_ids_NK: Tensor  # int64 ids of the whole vocabulary; where the mass is 0, any valid id
    topk_masses_NK: Tensor  # float32 probabilities; an id may be repeated, its masses add up
    tail_mass_N: Tensor | None  # float32 probability of all other ids together; None: the tail was scaled away

    @classmethod
    def from_logprobs(
        cls, topk_ids_NK: Tensor, *, topk_logprobs_NK: Tensor, tail_logprob_N: Tensor, tail: Literal["renormalise", "ghost"]
    ) -> "SoftTargets":
        """Targets from stored natural-log probabilities (any float dtype; -inf is padding).

        `renormalise` scales each row's masses to sum to 1, as the papers do; `ghost` keeps the tail as one more bucket.
        """
        masses_NK = topk_logprobs_NK.float().exp()
        total_N = masses_NK.sum(-1)
        if tail == "renormalise":
            masses_NK = masses_NK / torch.where(total_N > 0, total_N, 1.0)[:, None]
            return cls(topk_ids_NK=topk_ids_NK, topk_masses_NK=masses_NK, tail_mass_N=None)
        tail_mass_N = torch.where(total_N > 0, tail_logprob_N.float().exp(), 0.0)
        return cls(topk_ids_NK=topk_ids_NK, topk_masses_NK=masses_NK, tail_mass_N=tail_mass_N)


def fusion_loss(
    logits_NV: Tensor, *, labels_N: Tensor, soft: SoftTargets | None, group: dist.ProcessGroup | None, vocab_size: int
) -> tuple[Tensor, Tensor | None]:
    """Per-position cross-entropy with the label and with the fused target, in nats.

    With p = softmax(z) over the whole vocabulary, q the masses of the target at its ids, R its tail mass and s = 1 - Σ p[ids] the
    student's own tail mass::

        ce   = -log p[label]                               0 where the label is IGNORED
        soft = -Σ_k q_k log p[id_k]                        renormalise
        soft = -Σ_k q_k log p[id_k] - R log s              ghost

    The backward pass overwrites `logits_NV` with its gradient, which saves a second buffer of that size: use the logits for nothing else.

    Args:
        logits_NV: this rank's columns, any float dtype; columns at or beyond `vocab_size` are padding and get no probability.
        labels_N: int64 ids of the whole vocabulary, or IGNORED.
        soft: fused targets; None computes (and costs) nothing for them.
        group: the tensor-parallel ranks, in the order of their columns; None if there is one.
        vocab_size: ids of the vocabulary without padding.

    Returns:
        float32 losses `ce_N` and `soft_N` (None without targets), the same on every rank of the group.
    """
    if soft is None:
        ce_N, _ = _FusionLoss.apply(logits_NV, labels_N, None, None, None, group, vocab_size)
        return ce_N, None
    return _FusionLoss.apply(logits_NV, labels_N, soft.topk_ids_NK, soft.topk_masses_NK, soft.tail_mass_N, group, vocab_size)


@dataclass(frozen=True, slots=True)
class _Columns:
    """The slice of the vocabulary on this rank: ids first … first + valid - 1, then padding."""

    first: int
    valid: int

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of ids (0 where they are elsewhere), and whether they are here."""
        columns = ids - self.first
        here = (columns >= 0) & (columns < self.valid)
        return torch.where(here, columns, 0), here

    def stored(self, ids_nk: Tensor, *, masses_nk: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of the ids with mass, and whether the row has any here, `any_n1`.

        Entries that are padding or elsewhere repeat the row's first stored column (column 0 in a row without any), so that one value
        per column can be written without regard to the order.
        """
        columns_nk, here_nk = self.local(ids_nk)
        here_nk = here_nk & (masses_nk > 0)
        first_n1 = columns_nk.gather(1, here_nk.int().argmax(1, keepdim=True))
        any_n1 = here_nk.any(1, keepdim=True)
        return torch.where(here_nk, columns_nk, torch.where(any_n1, first_n1, 0)), any_n1


class _FusionLoss(torch.autograd.Function):
    """Gradient in the logits, by differentiating the formulas of `fusion_loss` (Q = Σ q, g = incoming gradients)::

        ce     p_v - 1[v = label]
        soft   Q p_v - q_v                                                    renormalise
               (Q + R) p_v - q_v              where v is one of the ids       ghost: -R log s = R (lse - lse_tail), and lse_tail
               (Q + R - R / s) p_v            elsewhere                       has the gradient p_v / s outside the ids, 0 at them

    so all of it is `c · p` with one number c per position, and corrections at the label and the ids.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        labels_N: Tensor,
        ids_NK: Tensor | None,
        masses_NK: Tensor | None,
        tail_mass_N: Tensor | None,
        group: dist.ProcessGroup | None,
        vocab_size: int,
    ) -> tuple[Tensor, Tensor | None]:
        columns = _columns(logits_NV.shape[1], group=group, vocab_size=vocab_size)
        max_N = _all_reduced(_row_max(logits_NV, columns=columns), op=dist.ReduceOp.MAX, group=group)
        sums = _partial_sums(logits_NV, labels_N, ids_NK, masses_NK, tail_mass_N, columns=columns, max_N=max_N)
        sums = _all_reduced(sums, op=dist.ReduceOp.SUM, group=group)
        log_total_N = sums[0].log()
        ce_N = torch.where(labels_N != IGNORED, log_total_N - sums[1], 0.0)
        soft_N = log_tail_N = mass_N = None
        if masses_NK is not None:
            mass_N = masses_NK.sum(-1)
            soft_N = mass_N * log_total_N - sums[2]
            if tail_mass_N is not None:
                # A tail of exactly 0 (all logits outside the ids underflow) would make the loss infinite.
                log_tail_N = sums[3].clamp(min=torch.finfo(torch.float32).tiny).log() - log_total_N
                soft_N -= tail_mass_N * log_tail_N
        ctx.save_for_backward(logits_NV, labels_N, ids_NK, masses_NK, tail_mass_N, max_N + log_total_N, mass_N, log_tail_N)
        ctx.columns = columns
        return ce_N, soft_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ce_N: Tensor, grad_soft_N: Tensor | None) -> tuple[Tensor | None, ...]:
        logits_NV, labels_N, ids_NK, masses_NK, tail_mass_N, lse_N, mass_N, log_tail_N = ctx.saved_tensors
        grad_NV, columns = logits_NV.detach(), ctx.columns  # the logits' own memory
        grad_ce_N = torch.where(labels_N != IGNORED, grad_ce_N, 0.0)
        for rows in _chunks(logits_NV):
            z_nv = grad_NV[rows]
            p_nv = z_nv.float().sub_(lse_N[rows, None]).exp_()  # in place where the logits are float32
            p_nv[:, columns.valid :] = 0
            ce_n = grad_ce_N[rows]
            if masses_NK is None or grad_soft_N is None:
                p_nv.mul_(ce_n[:, None])
            else:
                tail_n = None if tail_mass_N is None else (tail_mass_N[rows], log_tail_N[rows])
                _soft_gradient_(p_nv, ce_n, grad_soft_N[rows], ids_NK[rows], masses_NK[rows], mass_N[rows], tail_n=tail_n, columns=columns)
            label_n, here_n = columns.local(labels_N[rows])
            p_nv.scatter_add_(1, label_n[:, None], torch.where(here_n, -ce_n, 0.0)[:, None])
            if z_nv.dtype != torch.float32:
                z_nv.copy_(p_nv)
        return grad_NV, None, None, None, None, None, None


def _soft_gradient_(
    p_nv: Tensor,
    ce_n: Tensor,
    soft_n: Tensor,
    ids_nk: Tensor,
    masses_nk: Tensor,
    mass_n: Tensor,
    *,
    tail_n: tuple[Tensor, Tensor] | None,
    columns: _Columns,
) -> None:
    """Turn the softmax `p_nv` in place into the gradient of both losses, all but the label's -1; `ce_n`, `soft_n` are incoming."""
    if tail_n is None:
        p_nv.mul_((ce_n + soft_n * mass_n)[:, None])
    else:
        tail_mass_n, log_tail_n = tail_n
        at_ids_n = ce_n + soft_n * (mass_n + tail_mass_n)
        elsewhere_n = at_ids_n - soft_n * torch.where(tail_mass_n > 0, tail_mass_n * (-log_tail_n).exp(), 0.0)
        columns_nk, any_n1 = columns.stored(ids_nk, masses_nk=masses_nk)
        scale_n1 = torch.where(any_n1, at_ids_n[:, None], elsewhere_n[:, None])
        values_nk = p_nv.gather(1, columns_nk) * scale_n1
        p_nv.mul_(elsewhere_n[:, None]).scatter_(1, columns_nk, values_nk)
    columns_nk, here_nk = columns.local(ids_nk)
    p_nv.scatter_add_(1, columns_nk, torch.where(here_nk, -soft_n[:, None] * masses_nk, 0.0))


def _partial_sums(
    logits_NV: Tensor,
    labels_N: Tensor,
    ids_NK: Tensor | None,
    masses_NK: Tensor | None,
    tail_mass_N: Tensor | None,
    *,
    columns: _Columns,
    max_N: Tensor,
) -> Tensor:
    """This rank's share of (Σ_v exp z_v, z[label], Σ_k q_k z[id_k], Σ_{v not an id} exp z_v), with z relative to the row's maximum."""
    n_sums = 2 if masses_NK is None else 3 if tail_mass_N is None else 4
    sums = max_N.new_zeros(n_sums, len(max_N))
    for rows in _chunks(logits_NV):
        z_nv, max_n1 = logits_NV[rows, : columns.valid], max_N[rows, None]
        if not columns.valid:
            continue
        label_n, here_n = columns.local(labels_N[rows])
        z_n = z_nv.gather(1, label_n[:, None]).float().sub_(max_n1)[:, 0]
        sums[1, rows] = torch.where(here_n, z_n, 0.0)
        exp_nv = (z_nv - max_n1).exp_() if z_nv.dtype == torch.float32 else z_nv.float().sub_(max_n1).exp_()
        sums[0, rows] = exp_nv.sum(-1)
        if ids_NK is None or masses_NK is None:
            continue
        columns_nk, here_nk = columns.local(ids_NK[rows])
        z_nk = z_nv.gather(1, columns_nk).float().sub_(max_n1)
        sums[2, rows] = torch.where(here_nk, z_nk * masses_NK[rows], 0.0).sum(-1)
        if tail_mass_N is not None:
            columns_nk, any_n1 = columns.stored(ids_NK[rows], masses_nk=masses_NK[rows])
            exp_nv.scatter_(1, columns_nk, torch.where(any_n1, 0.0, exp_nv.gather(1, columns_nk)))
            sums[3, rows] = exp_nv.sum(-1)
    return sums


def _columns(width: int, *, group: dist.ProcessGroup | None, vocab_size: int) -> _Columns:
    first = width * (dist.get_rank(group) if group is not None else 0)
    return _Columns(first, max(0, min(width, vocab_size - first)))


def _row_max(logits_NV: Tensor, *, columns: _Columns) -> Tensor:
    if not columns.valid:
        return torch.full((len(logits_NV),), -torch.inf, dtype=torch.float32, device=logits_NV.device)
    return logits_NV[:, : columns.valid].amax(-1).float()


def _all_reduced(values: Tensor, *, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(values, op=op, group=group)
    return values


def _chunks(logits_NV: Tensor) -> Iterator[slice]:
    n_rows = max(1, _CHUNK_ELEMENTS // logits_NV.shape[1])
    return (slice(start, start + n_rows) for start in range(0, len(logits_NV), n_rows))
