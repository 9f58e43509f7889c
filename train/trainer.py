"""The training loop of one rank: micro-batches, gradients over all ranks, optimizer step, metrics, checkpoints, export.

Losses are sums over positions divided by the counts of the whole global batch, so they do not depend on its division among ranks.
"""

import contextlib
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..store import durable
from ..store.errors import FuselineError
from ..store.trainings import read_metrics
from . import records
from .batch import MicroBatch
from .checkpoint import Checkpoints
from .config import TrainJob
from .convert import load_weights
from .cost import Cost, step_flops
from .data import TargetsData, prefetched
from .export import export
from .families import read_architecture
from .held_out import HeldOutText, over_domains
from .megatron import DistributedDataParallel, finalize_model_grads
from .metrics import Metrics
from .model import FusionModel
from .objective import Objective
from .optimizer import make_optimizer, make_scheduler
from .preflight import require_memory
from .rounding import RoundedWeights
from .runtime import Runtime
from .start import check_start
from .watch import SPIKES, WINDOW, Watch

_PRINT_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Losses:
    """The losses of one global batch, in nats per position; the same on every rank."""

    clm: float
    fusion: float | None
    tokens: int


class Asked(IntEnum):
    """Requests to a run besides its schedule; the larger value wins."""

    TO_SAVE = 1
    TO_STOP = 2


class Trainer:
    """One rank of a training run."""

    def __init__(self, job: TrainJob, *, runtime: Runtime) -> None:
        """Load the starting weights and index the data.

        Raises:
            FuselineError: the model, the targets or the settings do not fit each other.
        """
        self.job, self.config, self.runtime = job, job.config, runtime
        self.architecture = read_architecture(job.model_folder, training=job.config)
        cost = Cost.of(job.model_folder, architecture=self.architecture, config=job.config, arithmetic=runtime.arithmetic)
        require_memory(cost, config=job.config, free=runtime.free_memory)
        dist.barrier()  # all ranks have measured the free memory before any rank uses it
        self.data = TargetsData.of(job, vocab_size=self.architecture.vocab_size, pin_memory=runtime.pins_memory)
        self.objective = Objective(job.config, steps=self.data.steps)
        self.model = self._load_model()
        self.weights = RoundedWeights(self.model.module, dtype=getattr(torch, job.config.dtype))
        self.optimizer = make_optimizer(self.model, config=job.config, runtime=runtime)
        self.scheduler = make_scheduler(self.optimizer, config=job.config, steps=self.data.steps)
        identity = job.identity | self.data.identity
        self.checkpoints = Checkpoints(
            job.run_folder, identity=identity, dtype=job.config.dtype, model=self.model, optimizer=self.optimizer, runtime=runtime
        )
        self.held_out = HeldOutText(job, runtime=runtime)
        self._parameters = cost.parameters
        self._watches: dict[str, Watch] = {}  # on the leading rank
        self._start_warning: str | None = None  # likewise
        self._stop_asked = False

    def run(self) -> None:
        """Train from the newest checkpoint to the end, and export the model.

        Raises:
            FuselineError: the loss is not finite, or a SIGTERM or SIGUSR1 arrived; in that case a checkpoint was saved.
        """
        for number in (signal.SIGTERM, signal.SIGUSR1):  # Slurm announces the end of a job's time with SIGUSR1
            signal.signal(number, lambda *_: setattr(self, "_stop_asked", True))
        started = self._saved_at = self._printed_at = time.monotonic()
        with self.weights.masters():
            step = self.checkpoints.resume()
        self.scheduler.step(step)
        with Metrics(self.job.run_folder, step=step) if self.runtime.leads else contextlib.nullcontext() as metrics:
            if self.runtime.leads:
                before = read_metrics(self.job.run_folder)[-WINDOW:]
                self._watches = {name: Watch(spike, before=[record[name] for record in before]) for name, spike in SPIKES.items()}
            if step == 0:
                self._check_start()
                self._evaluate(step, metrics=metrics)
            batches = prefetched(
                lambda t: self.data.micro_batches(t, data_rank=self.runtime.data_rank),
                range(step, self.data.steps),
                begin=self.runtime.begin_thread,
            )
            for batch, waited in _timed(batches):
                record = self.train_step(step, batch, data_wait_seconds=waited)
                step += 1
                if self._is_due(self.config.evaluate_every, step=step):
                    record["held_out_bpb"] = self._evaluate(step, metrics=metrics)
                if metrics is not None:
                    metrics.add(record)
                    self._tell(record)
                asked = self._asked()
                if asked or self._is_due(self.config.checkpoint_every, step=step):
                    with self.weights.masters():
                        self.checkpoints.save(step, keep=self.config.keep_checkpoints)
                    self._saved_at = time.monotonic()
                if asked is Asked.TO_STOP and step < self.data.steps:
                    raise FuselineError(
                        f"The training was stopped; a checkpoint of step {step} is saved. Run the same command to continue."
                    )
        self._finish(seconds=time.monotonic() - started)

    def _check_start(self) -> None:
        """Check the start, and keep a warning for the first step's record. Every rank must call it."""
        found = check_start(self.model.module, job=self.job, runtime=self.runtime, n_layers=self.architecture.n_layers)
        if found is not None and self.runtime.leads:
            durable.write_json(self.job.run_folder / "start.json", asdict(found))
            self._start_warning = found.warning

    def _tell(self, record: records.Record) -> None:
        """Print a line at intervals, for users who started the ranks by hand; otherwise it goes to the log."""
        now = time.monotonic()
        if record["warning"] is not None:
            print(record["warning"], flush=True)
        if now - self._printed_at >= _PRINT_SECONDS or record["step"] == self.data.steps:
            print(records.figures(record), flush=True)
            self._printed_at = now

    def _is_due(self, every: int | None, *, step: int) -> bool:
        return every is not None and (step % every == 0 or step == self.data.steps)

    def _asked(self) -> "Asked | None":
        """The request from a signal on any rank, or from the leading rank's clock; the same on every rank. Every rank must call it."""
        minutes = self.config.checkpoint_minutes
        is_time = self.runtime.leads and minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        asked = torch.tensor(Asked.TO_STOP if self._stop_asked else Asked.TO_SAVE if is_time else 0, device=self.runtime.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return Asked(int(asked)) if asked else None

    def _evaluate(self, step: int, *, metrics: Metrics | None) -> float | None:
        """Bits per byte of the held-out text, if there is any."""
        found = self.held_out.evaluate(self.model.module, step=step)
        if metrics is not None:
            metrics.add_evaluation(found)
        return over_domains(found)

    def _load_model(self) -> DistributedDataParallel:
        model = FusionModel(self.architecture, runtime=self.runtime, recompute=self.config.recompute)
        model = model.to(device=self.runtime.device, dtype=self.runtime.dtype)
        load_weights(
            model,
            model_folder=self.job.model_folder,
            architecture=self.architecture,
            ranks=self.runtime.tensor_parallel,
            rank=self.runtime.tensor_rank,
        )
        return DistributedDataParallel(model.config, self.runtime.gradient_settings, model)

    def train_step(self, step: int, batch: Sequence[MicroBatch], *, data_wait_seconds: float) -> records.Record:
        """One optimizer step on this rank's share of a batch; returns its record. Every rank must call it."""
        started = time.monotonic()
        losses, is_finite = self._backward(batch, step=step)
        loss = self.objective.total(clm=losses.clm, fusion=losses.fusion, step=step)
        if not math.isfinite(loss):
            raise self._failure(step, f"the loss is {loss}", is_finite=is_finite)
        finalize_model_grads([self.model])
        self.scheduler.step(1)
        with self.weights.masters():
            _, gradient_norm, _ = self.optimizer.step()
        if not math.isfinite(gradient_norm):
            raise self._failure(step, f"the norm of the gradient is {gradient_norm}", is_finite=is_finite)
        seconds = time.monotonic() - started + data_wait_seconds
        return {
            "step": step + 1,
            "steps": self.data.steps,
            "loss": loss,
            "clm_loss": losses.clm,
            "fusion_loss": losses.fusion,
            "clm_weight": self.objective.clm_weight(step),
            "grad_norm": float(gradient_norm),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "tokens": losses.tokens,
            "tokens_per_second": losses.tokens / seconds,
            "data_wait_seconds": data_wait_seconds,
            "mfu": self._utilisation(batch, seconds=seconds),
            "peak_memory_bytes": self.runtime.peak_memory,
            "held_out_bpb": None,
            "warning": self._warning(step, loss=loss, grad_norm=float(gradient_norm)),
        }

    def _utilisation(self, batch: Sequence[MicroBatch], *, seconds: float) -> float | None:
        """Share of the device's peak that the model's operations use (MFU); None if the peak is not known."""
        if self.runtime.peak_flops is None:
            return None
        lengths = [length for micro_batch in batch for length in micro_batch.lengths]
        flops = step_flops(self.architecture, parameters=self._parameters, lengths=lengths) / self.runtime.tensor_parallel
        return flops / (seconds * self.runtime.peak_flops)

    def _warning(self, step: int, **values: float) -> str | None:
        """Warnings about a step, on the leading rank."""
        found = [
            f"{name} ({values[name]:.3g}) is {ratio:.1f} times the median of the steps before"
            for name, watch in self._watches.items()
            if (ratio := watch.ratio(values[name])) is not None
        ]
        odd = [f"step {step + 1}: {', '.join(found)}; the batch has {self.data.named(self.data.packs(step))}"] if found else []
        return ". ".join(([self._start_warning] if self._start_warning and step == 0 else []) + odd) or None

    def _backward(self, batch: Sequence[MicroBatch], *, step: int) -> tuple[_Losses, list[Tensor]]:
        """Gradients of this rank's micro-batches, losses of the global batch, and whether each micro-batch's loss is finite."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        total_weights = self._summed(torch.stack([self.objective.weights(micro_batch) for micro_batch in batch]).sum(0))
        sums = torch.zeros(3, dtype=torch.float64, device=self.runtime.device)
        sums[2] = sum(len(micro_batch.token_ids_T) for micro_batch in batch)
        is_finite: list[Tensor] = []  # read only after a problem, because reading makes a GPU wait
        for i, micro_batch in enumerate(batch):
            with self.model.no_sync() if i + 1 < len(batch) else contextlib.nullcontext():
                here = micro_batch.to(self.runtime.device)
                loss, means = self.objective.loss(*self.model(here), batch=here, step=step, total_weights=total_weights)
                sums[:2] += means
                is_finite.append(loss.detach().isfinite())
                loss.backward()
        sums = self._summed(sums)
        return _Losses(
            clm=float(sums[0]),
            fusion=float(sums[1]) if self.config.uses_targets else None,
            tokens=round(sums[2].item()),
        ), is_finite

    def _summed(self, values: Tensor) -> Tensor:
        """Sum over the data-parallel ranks. All ranks take part, so that they agree; equal values of tensor-parallel ranks are averaged."""
        values = values.to(device=self.runtime.device, dtype=torch.float64)
        dist.all_reduce(values)
        return values / self.runtime.tensor_parallel

    def _failure(self, step: int, what: str, *, is_finite: Sequence[Tensor]) -> FuselineError:
        """The error that names the documents of the first bad micro-batch of any rank, or of the whole batch. Every rank must call it."""
        packs = self.data.packs(step)
        share = len(packs) // self.config.data_parallel
        bad = next((i for i, finite in enumerate(is_finite) if not finite), None)
        own = len(packs) if bad is None else self.runtime.data_rank * share + bad * self.config.micro_batch_size
        first = torch.tensor(own, device=self.runtime.device)
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
        if first < len(packs):
            packs = packs[int(first) : int(first) + self.config.micro_batch_size]
        saved = records.last_checkpoint(self.job.run_folder)
        good = "there is no checkpoint yet" if saved is None else f"the last good checkpoint is that of step {saved}"
        return FuselineError(
            f"Step {step + 1}: {what} in a batch with {self.data.named(packs)}; {good}. "
            "Lower learning_rate, or check these segments in the targets and the models."
        )

    def _finish(self, *, seconds: float) -> None:
        facts: dict[str, Any] = {}
        if self.runtime.leads:
            last = read_metrics(self.job.run_folder)[-1]
            facts = {name: last[name] for name in ("step", "loss", "clm_loss", "fusion_loss", "held_out_bpb")}
        export(self.model.module, job=self.job, architecture=self.architecture, runtime=self.runtime, facts=facts)
        if self.runtime.leads:
            done = facts | {"seconds": seconds, "export": str(self.job.export_folder), "identity": self.job.identity}
            done["segments_without_labels"] = self.data.reading.without_labels
            durable.write_json(self.job.run_folder / "done.json", done)
            print(f"model written to {self.job.export_folder}", flush=True)
        dist.barrier()


def _timed(batches: Iterator[Sequence[MicroBatch]]) -> Iterator[tuple[Sequence[MicroBatch], float]]:
    """Batches with the seconds of waiting for each."""
    while True:
        started = time.monotonic()
        try:
            batch = next(batches)
        except StopIteration:
            return
        yield batch, time.monotonic() - started
