"""Next-token and fused-target cross-entropy over a vocabulary that is split across tensor-parallel ranks.

Axes: N positions, V columns of the vocabulary on this rank, K stored entries of a target distribution.

The dense target (N, V) is never built: the gradient in the logits is a multiple of the student's softmax, corrected at the K stored ids.
Both losses together need one MAX all-reduce of N numbers and one SUM all-reduce of at most 4 N, for any K and V. The fused target needs no
additional pass over the logits (with a temperature, one in each direction).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # label of a position without a next token
CHUNK_ELEMENTS = 1 << 20  # logits processed at a time on a CPU: 4 MB of float32, which fit its caches (`benchmarks/loss.py`)


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftTargets:
    """Fused next-token distributions of N positions; a position without one has only zero masses."""

    topk_ids_NK: Tensor  # int64 ids of the whole vocabulary; any valid id if the mass is 0
    topk_masses_NK: Tensor  # float32 probabilities; the masses of a repeated id are summed
    tail_mass_N: Tensor | None  # float32 probability of all other ids together; None: the tail was scaled away
    temperature: float = 1.0  # temperature T of the masses and of the student in the comparison; 1 with a tail

    @classmethod
    def from_logprobs(
        cls,
        topk_ids_NK: Tensor,
        *,
        topk_logprobs_NK: Tensor,
        tail_logprob_N: Tensor,
        tail: Literal["renormalise", "ghost"],
        temperature: float = 1.0,
    ) -> "SoftTargets":
        """Targets from stored natural-log probabilities (any float dtype; -inf is padding).

        `renormalise` scales each row's masses to sum to 1, as the papers do; `ghost` keeps the tail as one more bucket. A temperature
        divides the log-probabilities before they are renormalised.
        """
        assert temperature == 1 or tail == "renormalise", "with a temperature the mass of the tail is not known"
        masses_NK = (topk_logprobs_NK.float() / temperature).exp()
        total_N = masses_NK.sum(-1)
        if tail == "renormalise":
            masses_NK = masses_NK / torch.where(total_N > 0, total_N, 1.0)[:, None]
            return cls(topk_ids_NK=topk_ids_NK, topk_masses_NK=masses_NK, tail_mass_N=None, temperature=temperature)
        tail_mass_N = torch.where(total_N > 0, tail_logprob_N.float().exp(), 0.0)
        return cls(topk_ids_NK=topk_ids_NK, topk_masses_NK=masses_NK, tail_mass_N=tail_mass_N)

    def each(self, change: Callable[[Tensor], Tensor]) -> "SoftTargets":
        """The same targets with a function applied to each tensor, such as a move or a slice."""
        tail_mass_N = None if self.tail_mass_N is None else change(self.tail_mass_N)
        return replace(self, topk_ids_NK=change(self.topk_ids_NK), topk_masses_NK=change(self.topk_masses_NK), tail_mass_N=tail_mass_N)

    def is_known_N(self) -> Tensor:
        """Whether a position has a target."""
        return self.topk_masses_NK.sum(-1) > 0

    def entropy_N(self) -> Tensor:
        """Entropy of each target in nats, with its tail as one bucket: `fusion_loss`, without T², of a student that equals the target."""
        mass_of_id_NK = torch.zeros_like(self.topk_masses_NK)
        for ids_N, masses_N in zip(self.topk_ids_NK.T, self.topk_masses_NK.T, strict=True):
            mass_of_id_NK += torch.where(self.topk_ids_NK == ids_N[:, None], masses_N[:, None], 0.0)
        entropy_N = -torch.xlogy(self.topk_masses_NK, mass_of_id_NK).sum(-1)
        return entropy_N if self.tail_mass_N is None else entropy_N - torch.xlogy(self.tail_mass_N, self.tail_mass_N)


def fusion_loss(
    logits_NV: Tensor,
    *,
    labels_N: Tensor,
    soft: SoftTargets | None,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor | None]:
    """Per-position cross-entropy with the label and with the fused target, in nats.

    With p = softmax(z) over the whole vocabulary, p' = softmax(z / T), q the masses of the target at its ids, R its tail mass, T its
    temperature and s = 1 - Σ p[ids] the student's own tail mass::

        ce   = -log p[label]                               0 if the label is IGNORED
        soft = -T² Σ_k q_k log p'[id_k]                    renormalise (T² as in Hinton et al., arXiv:1503.02531, section 2)
        soft = -Σ_k q_k log p[id_k] - R log s              ghost, at T = 1

    The backward pass overwrites `logits_NV` with its gradient, which saves a second buffer of that size. Do not use the logits afterwards.

    Args:
        logits_NV: this rank's columns, any float dtype; columns at or beyond `vocab_size` are padding and get no probability.
        labels_N: int64 ids of the whole vocabulary, or IGNORED.
        soft: fused targets; None computes (and costs) nothing for them.
        group: the tensor-parallel ranks, in the order of their columns; None if there is only one.
        vocab_size: ids of the vocabulary without padding.
        chunk_elements: logits processed at a time; besides the logits, the loss takes twice their float32 size of memory.

    Returns:
        float32 losses `ce_N` and `soft_N` (None without targets), the same on every rank of the group.
    """
    temperature = 1.0 if soft is None else soft.temperature
    how = _How(group=group, vocab_size=vocab_size, temperature=temperature, chunk_elements=chunk_elements)
    if soft is None:
        ce_N, _ = _FusionLoss.apply(logits_NV, labels_N, None, None, None, how)
        return ce_N, None
    return _FusionLoss.apply(logits_NV, labels_N, soft.topk_ids_NK, soft.topk_masses_NK, soft.tail_mass_N, how)


@dataclass(frozen=True, slots=True, kw_only=True)
class _How:
    group: dist.ProcessGroup | None
    vocab_size: int
    temperature: float
    chunk_elements: int

    def chunks(self, logits_NV: Tensor) -> Iterator[slice]:
        n_rows = max(1, self.chunk_elements // logits_NV.shape[1])
        return (slice(start, start + n_rows) for start in range(0, len(logits_NV), n_rows))


@dataclass(frozen=True, slots=True)
class _Columns:
    """The slice of the vocabulary on this rank: ids first … first + valid - 1, then padding."""

    first: int
    valid: int

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of ids on this rank (0 for others), and whether they are on this rank."""
        columns = ids - self.first
        here = (columns >= 0) & (columns < self.valid)
        return torch.where(here, columns, 0), here

    def stored(self, ids_nk: Tensor, *, masses_nk: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of the ids with mass, and whether the row has any on this rank, `any_n1`.

        Entries that are padding or on another rank repeat the row's first stored column (column 0 if there is none), so that one value per
        column can be written in any order.
        """
        columns_nk, here_nk = self.local(ids_nk)
        here_nk = here_nk & (masses_nk > 0)
        first_n1 = columns_nk.gather(1, here_nk.int().argmax(1, keepdim=True))
        any_n1 = here_nk.any(1, keepdim=True)
        return torch.where(here_nk, columns_nk, torch.where(any_n1, first_n1, 0)), any_n1


class _FusionLoss(torch.autograd.Function):
    """Gradient in the logits, by differentiating the formulas of `fusion_loss` (Q = Σ q, g = incoming gradients)::

        ce     p_v - 1[v = label]
        soft   T (Q p'_v - q_v)                                               renormalise
               (Q + R) p_v - q_v              where v is one of the ids       ghost: -R log s = R (lse - lse_tail), and lse_tail
               (Q + R - R / s) p_v            elsewhere                       has the gradient p_v / s outside the ids, 0 at them

    so the gradient is `c · p` (and `c' · p'`) with one number c per position, plus corrections at the label and the ids.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        labels_N: Tensor,
        ids_NK: Tensor | None,
        masses_NK: Tensor | None,
        tail_mass_N: Tensor | None,
        how: _How,
    ) -> tuple[Tensor, Tensor | None]:
        columns = _columns(logits_NV.shape[1], how=how)
        max_N = _all_reduced(_row_max(logits_NV, columns=columns), op=dist.ReduceOp.MAX, group=how.group)
        sums = _partial_sums(logits_NV, labels_N, ids_NK, masses_NK, tail_mass_N, columns=columns, max_N=max_N, how=how)
        sums = _all_reduced(sums, op=dist.ReduceOp.SUM, group=how.group)
        log_total_N = sums[0].log()
        ce_N = torch.where(labels_N != IGNORED, log_total_N - sums[1], 0.0)
        soft_N = log_tail_N = mass_N = soft_lse_N = None
        if masses_NK is not None:
            mass_N, soft_log_total_N = masses_NK.sum(-1), log_total_N
            if how.temperature != 1:
                soft_log_total_N = sums[3].log()
                soft_lse_N = max_N / how.temperature + soft_log_total_N
            soft_N = how.temperature**2 * (mass_N * soft_log_total_N - sums[2])
            if tail_mass_N is not None:
                # A tail of exactly 0 (all logits outside the ids underflow) would make the loss infinite.
                log_tail_N = sums[3].clamp(min=torch.finfo(torch.float32).tiny).log() - log_total_N
                soft_N -= tail_mass_N * log_tail_N
        ctx.save_for_backward(logits_NV, labels_N, ids_NK, masses_NK, tail_mass_N, max_N + log_total_N, soft_lse_N, mass_N, log_tail_N)
        ctx.columns, ctx.how = columns, how
        return ce_N, soft_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ce_N: Tensor, grad_soft_N: Tensor | None) -> tuple[Tensor | None, ...]:
        logits_NV, labels_N, ids_NK, masses_NK, tail_mass_N, lse_N, soft_lse_N, mass_N, log_tail_N = ctx.saved_tensors
        grad_NV, columns, how = logits_NV.detach(), ctx.columns, ctx.how  # the logits' own memory
        grad_ce_N = torch.where(labels_N != IGNORED, grad_ce_N, 0.0)
        soft = None
        if masses_NK is not None and grad_soft_N is not None:
            soft = _SoftGradient(grad_soft_N * how.temperature, ids_NK, masses_NK, mass_N, soft_lse_N, tail_mass_N, log_tail_N)
        for rows in how.chunks(logits_NV):
            z_nv, ce_n = grad_NV[rows], grad_ce_N[rows]
            soft_p_nv = None if soft is None or soft_lse_N is None else soft.scaled_softmax(z_nv, rows=rows, how=how)
            p_nv = z_nv.float().sub_(lse_N[rows, None]).exp_()  # in place if the logits are float32
            if soft is None:
                p_nv.mul_(ce_n[:, None])
            elif soft_p_nv is not None:
                p_nv.mul_(ce_n[:, None]).add_(soft_p_nv)
            else:
                soft.scale_(p_nv, ce_n=ce_n, rows=rows, columns=columns)
            p_nv[:, columns.valid :] = 0
            if soft is not None:
                soft.subtract_masses_(p_nv, rows=rows, columns=columns)
            label_n, here_n = columns.local(labels_N[rows])
            p_nv.scatter_add_(1, label_n[:, None], torch.where(here_n, -ce_n, 0.0)[:, None])
            if z_nv.dtype != torch.float32:
                z_nv.copy_(p_nv)
        return grad_NV, None, None, None, None, None


@dataclass(frozen=True, slots=True)
class _SoftGradient:
    """The fused targets' part of the gradient, for some rows at a time."""

    grad_N: Tensor  # incoming, times T
    ids_NK: Tensor
    masses_NK: Tensor
    mass_N: Tensor
    lse_N: Tensor | None  # of z / T; None: T is 1
    tail_mass_N: Tensor | None
    log_tail_N: Tensor | None  # log s

    def scaled_softmax(self, z_nv: Tensor, *, rows: slice, how: _How) -> Tensor:
        """`c' p'`: the share of the student's softmax at the temperature."""
        assert self.lse_N is not None
        p_nv = (z_nv.float() / how.temperature).sub_(self.lse_N[rows, None]).exp_()
        return p_nv.mul_((self.grad_N * self.mass_N)[rows, None])

    def scale_(self, p_nv: Tensor, *, ce_n: Tensor, rows: slice, columns: _Columns) -> None:
        """Multiply the softmax `p_nv` in place by the factors of both losses."""
        soft_n, mass_n = self.grad_N[rows], self.mass_N[rows]
        if self.tail_mass_N is None or self.log_tail_N is None:
            p_nv.mul_((ce_n + soft_n * mass_n)[:, None])
            return
        tail_mass_n, log_tail_n = self.tail_mass_N[rows], self.log_tail_N[rows]
        at_ids_n = ce_n + soft_n * (mass_n + tail_mass_n)
        elsewhere_n = at_ids_n - soft_n * torch.where(tail_mass_n > 0, tail_mass_n * (-log_tail_n).exp(), 0.0)
        columns_nk, any_n1 = columns.stored(self.ids_NK[rows], masses_nk=self.masses_NK[rows])
        scale_n1 = torch.where(any_n1, at_ids_n[:, None], elsewhere_n[:, None])
        values_nk = p_nv.gather(1, columns_nk) * scale_n1
        p_nv.mul_(elsewhere_n[:, None]).scatter_(1, columns_nk, values_nk)

    def subtract_masses_(self, p_nv: Tensor, *, rows: slice, columns: _Columns) -> None:
        """Subtract the masses at their ids."""
        columns_nk, here_nk = columns.local(self.ids_NK[rows])
        p_nv.scatter_add_(1, columns_nk, torch.where(here_nk, -self.grad_N[rows, None] * self.masses_NK[rows], 0.0))


def _partial_sums(
    logits_NV: Tensor,
    labels_N: Tensor,
    ids_NK: Tensor | None,
    masses_NK: Tensor | None,
    tail_mass_N: Tensor | None,
    *,
    columns: _Columns,
    max_N: Tensor,
    how: _How,
) -> Tensor:
    """This rank's share of each row's sums, with z relative to the row's maximum::

    Σ_v exp z_v    z[label]    Σ_k q_k z[id_k] / T    with a tail: Σ_{v not an id} exp z_v; at a temperature: Σ_v exp(z_v / T)
    """
    has_fourth = tail_mass_N is not None or (masses_NK is not None and how.temperature != 1)
    sums = max_N.new_zeros(2 if masses_NK is None else 4 if has_fourth else 3, len(max_N))
    if not columns.valid:
        return sums
    for rows in how.chunks(logits_NV):
        z_nv, max_n1 = logits_NV[rows, : columns.valid], max_N[rows, None]
        label_n, here_n = columns.local(labels_N[rows])
        z_n = z_nv.gather(1, label_n[:, None]).float().sub_(max_n1)[:, 0]
        sums[1, rows] = torch.where(here_n, z_n, 0.0)
        exp_nv = (z_nv - max_n1 if z_nv.dtype == torch.float32 else z_nv.float().sub_(max_n1)).exp_()
        if ids_NK is None or masses_NK is None:
            sums[0, rows] = exp_nv.sum(-1)
            continue
        columns_nk, here_nk = columns.local(ids_NK[rows])
        z_nk = z_nv.gather(1, columns_nk).float().sub_(max_n1)
        sums[2, rows] = torch.where(here_nk, z_nk * masses_NK[rows], 0.0).sum(-1) / how.temperature
        if tail_mass_N is None:
            sums[0, rows] = exp_nv.sum(-1)
        else:
            # The total is the tail plus the ids, a sum of positive terms; the total minus the ids would lose precision.
            columns_nk, any_n1 = columns.stored(ids_NK[rows], masses_nk=masses_NK[rows])
            at_ids_nk = torch.where(any_n1, exp_nv.gather(1, columns_nk), 0.0)
            exp_nv.scatter_(1, columns_nk, torch.where(any_n1, 0.0, exp_nv.gather(1, columns_nk)))
            sums[3, rows] = exp_nv.sum(-1)
            sums[0, rows] = sums[3, rows] + at_ids_nk.masked_fill_(_repeats(columns_nk), 0.0).sum(-1)
        if how.temperature != 1:
            del exp_nv
            soft_nv = z_nv - max_n1 if z_nv.dtype == torch.float32 else z_nv.float().sub_(max_n1)
            sums[3, rows] = soft_nv.div_(how.temperature).exp_().sum(-1)
    return sums


def _repeats(columns_nk: Tensor) -> Tensor:
    """Whether an entry's column occurs earlier in its row."""
    return (columns_nk[:, :, None] == columns_nk[:, None, :]).tril_(-1).any(-1)


def _columns(width: int, *, how: _How) -> _Columns:
    first = width * (dist.get_rank(how.group) if how.group is not None else 0)
    return _Columns(first, max(0, min(width, how.vocab_size - first)))


def _row_max(logits_NV: Tensor, *, columns: _Columns) -> Tensor:
    if not columns.valid:
        return torch.full((len(logits_NV),), -torch.inf, dtype=torch.float32, device=logits_NV.device)
    return logits_NV[:, : columns.valid].amax(-1).float()


def _all_reduced(values: Tensor, *, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(values, op=op, group=group)
    return values
