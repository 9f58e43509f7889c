"""The loss alone, forward and backward: fused targets against the next token only (clm_weight = 1), and against a dense target.

    python benchmarks/loss.py [--vocabulary 49152 151936] [--positions 2048] [--top-k 10] [--dtype float32] [--rounds 5] [--chunks 18 20 22]

Times are of all variants in turn, in one process (on CPUs the processor's, so that other work on the machine counts less: give it one
thread by OMP_NUM_THREADS=1), and ratios are medians over the rounds. Memory is the peak of a process of its own (or of the GPU), less what
the logits take; on CPUs Linux must tell it. The dense target is what the published trainer builds: (positions, vocabulary), and autograd.
"""

import argparse
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from statistics import median

import psutil
import torch
from fuseline.train.loss import CHUNK_ELEMENTS, SoftTargets, fusion_loss
from timer import timed
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VARIANTS = ("clm", "renormalise", "ghost", "temperature", "dense")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[49_152, 151_936])
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunks", type=int, nargs="+", default=[], help="also compare chunks of 2 to the power of each")
    arguments = parser.parse_args()
    for vocabulary in arguments.vocabulary:
        shape = {"n": arguments.positions, "v": vocabulary, "k": arguments.top_k, "dtype": getattr(torch, arguments.dtype)}
        seconds = in_rounds({name: variant(name, **shape) for name in VARIANTS}, rounds=arguments.rounds)
        gigabytes = {name: peak_gigabytes(name, shape) for name in VARIANTS}
        print(f"{DEVICE.type}, vocabulary {vocabulary}, {arguments.positions} positions, k = {arguments.top_k}, {arguments.dtype}")
        for name in VARIANTS:
            ratio = median(mine / baseline for mine, baseline in zip(seconds[name], seconds["clm"], strict=True))
            print(
                f"  {name:12} {median(seconds[name]) * 1e3:7.0f} ms ({ratio:.2f} of clm)   "
                f"{gigabytes[name]:5.2f} GB beside the logits ({gigabytes[name] / gigabytes['dense']:.3f} of dense)"
            )
        sizes = {f"2^{log}": variant("ghost", **shape, chunk_elements=1 << log) for log in arguments.chunks}
        for name, times in in_rounds(sizes, rounds=arguments.rounds).items():
            print(f"  ghost, chunks of {name} logits: {median(times) * 1e3:.0f} ms")


def variant(name: str, *, n: int, v: int, k: int, dtype: torch.dtype, chunk_elements: int | None = None) -> Callable[[], None]:
    """A function that computes both losses and the gradient in fresh logits."""
    random = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(n, v, generator=random).to(DEVICE, dtype)
    labels_N = torch.randint(0, v, (n,), generator=random).to(DEVICE)
    logprobs_NK = torch.distributions.Dirichlet(torch.ones(k + 1)).sample((n,)).log().to(DEVICE)
    soft = None
    if name != "clm":
        soft = SoftTargets.from_logprobs(
            torch.randint(0, v, (n, k), generator=random).to(DEVICE),
            topk_logprobs_NK=logprobs_NK[:, :k],
            tail_logprob_N=logprobs_NK[:, k],
            tail="ghost" if name == "ghost" else "renormalise",
            temperature=2.0 if name == "temperature" else 1.0,
        )
    chunk_elements = chunk_elements or (CHUNK_ELEMENTS if DEVICE.type == "cpu" else 1 << 27)

    def run() -> None:
        leaf_NV = logits_NV.requires_grad_()
        leaf_NV.grad = None
        if name == "dense" and soft is not None:
            ce_N, soft_N = dense(leaf_NV, labels_N, soft)
        else:
            # The logits' memory becomes their gradient's, as in training; what is in it makes no difference to the time.
            ce_N, soft_N = fusion_loss(
                _same(leaf_NV), labels_N=labels_N, soft=soft, group=None, vocab_size=v, chunk_elements=chunk_elements
            )
        (0.9 * ce_N.mean() + (0 if soft_N is None else 0.1 * soft_N.mean())).backward()

    return run


class _Same(torch.autograd.Function):
    """The logits as the output of an operation, so that they may be overwritten; the gradient goes no further."""

    @staticmethod
    def forward(ctx, logits_NV: Tensor) -> Tensor:
        return logits_NV.detach()

    @staticmethod
    def backward(ctx, grad_NV: Tensor) -> None:
        return None


def _same(logits_NV: Tensor) -> Tensor:
    return _Same.apply(logits_NV)


def dense(logits_NV: Tensor, labels_N: Tensor, soft: SoftTargets) -> tuple[Tensor, Tensor]:
    """Both losses over a target of the logits' shape."""
    target_NV = torch.zeros(logits_NV.shape, device=DEVICE).scatter_add_(1, soft.topk_ids_NK, soft.topk_masses_NK)
    logprobs_NV = logits_NV.float().log_softmax(-1)
    return torch.nn.functional.nll_loss(logprobs_NV, labels_N, reduction="none"), -(target_NV * logprobs_NV).sum(-1)


def in_rounds(runs: dict[str, Callable[[], None]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each in every round but a first, which warms up."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            found[name].append(timed(run).computing)
    return {name: times[1:] for name, times in found.items()}


def peak_gigabytes(name: str, shape: dict) -> float:
    """The most memory that one call takes beyond its inputs."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (name, shape))


def _peak(name: str, shape: dict) -> float:
    variant(name, **(shape | {"n": 8}))()  # loads what is loaded once
    run = variant(name, **shape)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = psutil.Process().memory_info().rss
    run()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return (int(line.split()[1]) * 1024 - before) / 1e9


if __name__ == "__main__":
    main()
