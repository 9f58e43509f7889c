"""The training loop of one rank: micro-batches, gradients over all ranks, an optimizer step, metrics, checkpoints, and the export.

Losses are sums over positions divided by the counts of the whole global batch, so they do not depend on how it is dealt to ranks.
"""

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..store import durable
from ..store.errors import FuselineError
from . import records
from .batch import MicroBatch
from .checkpoint import Checkpoints
from .config import TrainJob
from .convert import load_weights
from .data import TargetsData, prefetched
from .export import export
from .families import read_architecture
from .loss import IGNORED
from .megatron import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from .model import FusionModel
from .optimizer import make_optimizer, make_scheduler
from .runtime import Runtime


@dataclass(frozen=True, slots=True, kw_only=True)
class _Losses:
    """Of one global batch, in nats per position; the same on every rank."""

    clm: float
    fusion: float | None
    tokens: int
    stop: bool  # a rank was asked to stop

    def total(self, clm_weight: float) -> float:
        return self.clm if self.fusion is None else clm_weight * self.clm + (1 - clm_weight) * self.fusion


class Trainer:
    """One rank of a training run."""

    def __init__(self, job: TrainJob, *, runtime: Runtime) -> None:
        """Load the starting weights and index the data.

        Raises:
            FuselineError: the model, the targets or the settings do not fit each other.
        """
        self.job, self.config, self.runtime = job, job.config, runtime
        self.architecture = read_architecture(job.model_folder, training=job.config)
        self.data = TargetsData.of(job, vocab_size=self.architecture.vocab_size)
        self.model = self._load_model()
        self.optimizer = make_optimizer(self.model, config=job.config, runtime=runtime)
        self.scheduler = make_scheduler(self.optimizer, config=job.config, steps=self.data.steps)
        self.checkpoints = Checkpoints(job.run_folder, identity=job.identity, model=self.model, optimizer=self.optimizer, runtime=runtime)
        self._stop_asked = False

    def run(self) -> None:
        """Train from the newest checkpoint to the end, and export the model.

        Raises:
            FuselineError: the loss is not finite, or a SIGTERM came: then a checkpoint was saved first.
        """
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_stop_asked", True))
        started = time.monotonic()
        step = self.checkpoints.resume()
        self.scheduler.step(step)
        with self._metrics_writer(step) as write:
            batches = prefetched(lambda t: self.data.micro_batches(t, data_rank=self.runtime.data_rank), range(step, self.data.steps))
            for batch, waited in _timed(batches):
                metrics, stop = self._train_step(step, batch, data_wait_seconds=waited)
                step += 1
                write(metrics)
                if stop or step == self.data.steps or step % self.config.checkpoint_every == 0:
                    self.checkpoints.save(step, keep=self.config.keep_checkpoints)
                if stop and step < self.data.steps:
                    raise FuselineError(f"The training was stopped; a checkpoint of step {step} is saved. Run the same command to go on.")
        self._finish(seconds=time.monotonic() - started)

    def _load_model(self) -> DistributedDataParallel:
        model = FusionModel(
            self.architecture, runtime=self.runtime, max_length=self.config.sequence_length, recompute=self.config.recompute
        ).to(device=self.runtime.device, dtype=self.runtime.dtype)
        load_weights(
            model,
            model_folder=self.job.model_folder,
            architecture=self.architecture,
            ranks=self.runtime.tensor_parallel,
            rank=self.runtime.tensor_rank,
        )
        return DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)

    def _train_step(self, step: int, batch: Sequence[MicroBatch], *, data_wait_seconds: float) -> tuple[records.Record, bool]:
        started = time.monotonic()
        losses, first_bad = self._backward(batch)
        loss = losses.total(self.config.clm_weight)
        if not math.isfinite(loss):
            raise self._failure(step, f"the loss is {loss}", first_bad=first_bad)
        finalize_model_grads([self.model])
        self.scheduler.step(1)
        _, gradient_norm, _ = self.optimizer.step()
        if not math.isfinite(gradient_norm):
            raise self._failure(step, f"the norm of the gradient is {gradient_norm}", first_bad=None)
        seconds = time.monotonic() - started + data_wait_seconds
        return {
            "step": step + 1,
            "steps": self.data.steps,
            "loss": loss,
            "clm_loss": losses.clm,
            "fusion_loss": losses.fusion,
            "grad_norm": float(gradient_norm),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "tokens": losses.tokens,
            "tokens_per_second": losses.tokens / seconds,
            "data_wait_seconds": data_wait_seconds,
        }, losses.stop

    def _backward(self, batch: Sequence[MicroBatch]) -> tuple[_Losses, int | None]:
        """Gradients of this rank's micro-batches and losses of the global batch; also the first micro-batch whose loss is not finite."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        counts = self._summed(torch.stack([_counts(micro_batch) for micro_batch in batch]).sum(0))
        n_labels, n_targets = counts[0].clamp(min=1), counts[1].clamp(min=1)
        sums = torch.zeros(4, dtype=torch.float64, device=self.runtime.device)
        sums[2:] = torch.tensor([sum(len(micro_batch.token_ids_T) for micro_batch in batch), self._stop_asked])
        first_bad = None
        for i, micro_batch in enumerate(batch):
            with self.model.no_sync() if i + 1 < len(batch) else contextlib.nullcontext():
                ce_T, soft_T = self.model(micro_batch.to(self.runtime.device))
                loss = (self.config.clm_weight if self.config.uses_targets else 1.0) * ce_T.sum() / n_labels
                sums[0] += ce_T.detach().sum(dtype=torch.float64)
                if soft_T is not None:
                    loss = loss + (1 - self.config.clm_weight) * soft_T.sum() / n_targets
                    sums[1] += soft_T.detach().sum(dtype=torch.float64)
                if first_bad is None and not loss.isfinite():
                    first_bad = i
                loss.backward()
        sums = self._summed(sums)
        return _Losses(
            clm=float(sums[0] / n_labels),
            fusion=float(sums[1] / n_targets) if self.config.uses_targets else None,
            tokens=round(sums[2].item()),
            stop=sums[3].item() > 0,
        ), first_bad

    def _summed(self, values: Tensor) -> Tensor:
        """Sum over the data-parallel ranks. All ranks take part, so that all agree; equal values of tensor-parallel ranks average out."""
        values = values.to(device=self.runtime.device, dtype=torch.float64)
        dist.all_reduce(values)
        return values / self.runtime.tensor_parallel

    def _failure(self, step: int, what: str, *, first_bad: int | None) -> FuselineError:
        """The error that names the segments of the first bad micro-batch of any rank, or of the whole batch. Every rank must call it."""
        packs = self.data.packs(step)
        share = len(packs) // self.config.data_parallel
        own = len(packs) if first_bad is None else self.runtime.data_rank * share + first_bad * self.config.micro_batch_size
        first = torch.tensor(own, device=self.runtime.device)
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
        if first < len(packs):
            packs = packs[int(first) : int(first) + self.config.micro_batch_size]
        segments: dict[int, set[int]] = {}
        for piece in (piece for pack in packs for piece in pack):
            segments.setdefault(piece.part, set()).add(piece.segment)
        named = "; ".join(f"part {part}: {', '.join(map(str, sorted(numbers)[:8]))}" for part, numbers in sorted(segments.items())[:8])
        saved = records.last_checkpoint(self.job.run_folder)
        good = "there is no checkpoint yet" if saved is None else f"the last good checkpoint is that of step {saved}"
        return FuselineError(
            f"Step {step + 1}: {what} in a batch with these segments: {named}; {good}. "
            "Lower learning_rate, or look at those segments in the targets and their models."
        )

    @contextlib.contextmanager
    def _metrics_writer(self, step: int) -> Iterator[Any]:
        """A function that appends a step's record to metrics.jsonl and TensorBoard; on ranks other than 0 it does nothing."""
        if not self.runtime.leads:
            yield lambda record: None
            return
        records.cut_metrics(self.job.run_folder, step=step)
        events = SummaryWriter(str(self.job.run_folder / "tensorboard"), purge_step=step + 1)
        with events, (self.job.run_folder / "metrics.jsonl").open("a", encoding="utf-8") as lines:

            def write(record: records.Record) -> None:
                lines.write(json.dumps(record) + "\n")
                lines.flush()
                os.fsync(lines.fileno())  # a checkpoint must not outlive the records of its steps
                for name, value in record.items():
                    if name not in {"step", "steps"} and value is not None:
                        events.add_scalar(name, value, record["step"])

            yield write

    def _finish(self, *, seconds: float) -> None:
        facts: dict[str, Any] = {}
        if self.runtime.leads:
            last = records.read_metrics(self.job.run_folder)[-1]
            facts = {name: last[name] for name in ("step", "loss", "clm_loss", "fusion_loss")}
        export(self.model.module, job=self.job, architecture=self.architecture, runtime=self.runtime, facts=facts)
        if self.runtime.leads:
            done = facts | {"seconds": seconds, "export": str(self.job.export_folder), "identity": self.job.identity}
            durable.write_json(self.job.run_folder / "done.json", done)
        dist.barrier()


def _counts(batch: MicroBatch) -> Tensor:
    """Positions with a label, and positions with a fused target."""
    n_targets = 0 if batch.soft is None else int((batch.soft.topk_masses_NK.sum(-1) > 0).sum())
    return torch.tensor([int((batch.labels_T != IGNORED).sum()), n_targets])


def _timed(batches: Iterator[Sequence[MicroBatch]]) -> Iterator[tuple[Sequence[MicroBatch], float]]:
    """Batches with the seconds that were spent waiting for each."""
    while True:
        started = time.monotonic()
        try:
            batch = next(batches)
        except StopIteration:
            return
        yield batch, time.monotonic() - started
