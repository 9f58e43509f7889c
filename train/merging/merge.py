"""Merges the models of several folders into a new one, tensor by tensor and block by block.

One thread handles each tensor, from reading to writing, and torch uses no other threads meanwhile: its operations are too short to be
shared, and beside other work, threads that wait for each other took many times as long.
"""

import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...store import durable
from ...store.errors import DataError
from ..model_folder import copy_config, copy_tokenizer, write_model_card
from ..weight_files import WeightWriter
from .blocks import FileBlocks, is_finite
from .config import MergeConfig
from .identity import REPORT
from .methods import rule_of
from .plan import MergePlan, PlannedTensor, pieces_of, plan_merge

_SPARE_BYTES = 64 << 20  # for the files beside the weights
_MOST_THREADS = 16  # each needs memory for some blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReport:
    """The result for one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    weights: dict[str, float]  # of the models in this tensor; empty if it was copied
    moved: float | None  # share of the positions that differ from the base; None without a base


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """The report of a merge, stored as `merge_report.json` in its folder, with identity and lineage."""

    output: Path
    n_bytes: int
    tensors: tuple[TensorReport, ...]
    warnings: tuple[str, ...]


def merge(
    config: MergeConfig,
    *,
    base: Path | None,
    models: Mapping[str, Path],
    output: Path,
    identity: Mapping[str, Any],
    lineage: Mapping[str, Any],
    tokenizer_of: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Merge models into a new Hugging Face folder, which appears atomically. The order of the models does not matter.

    Computes in float32 (float64 weights in float64) and rounds once. Needs memory for a few blocks.

    Args:
        config: the method and its settings.
        base: folder of the model that the others were trained from. Every method except linear needs it; the merged model gets its
            config, and its rows of the vocabulary that not all models have.
        models: their folders by name.
        output: the new folder; it must not exist.
        identity: the result of `merge_identity`; stored in the report, for `merged_before`.
        lineage: what the models were made from, for the model card.
        tokenizer_of: folder to copy the tokenizer's files from; by default the base, without a base the first model by name.
        on_progress: called with the bytes written so far and in total, by one thread at a time.

    Raises:
        UsageError: the settings do not fit the models.
        DataError: the models do not fit each other, or cannot be merged; nothing is left behind.
        FileExistsError: `output` exists.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists")
    with ExitStack() as stack:
        plan = plan_merge(config, base=base, models=models, tokenizer_of=tokenizer_of, stack=stack)
        _clear_leftovers(output)
        _require_space(output.parent, n_bytes=plan.n_bytes)
        folder = stack.enter_context(durable.temporary(output))
        folder.mkdir()
        with ExitStack() as files:
            writer = WeightWriter(
                shapes={tensor.name: tensor.shape for tensor in plan.tensors},
                dtypes={tensor.name: tensor.dtype for tensor in plan.tensors},
                folder=folder,
                stack=files,
            )
            work = _Work(config, plan=plan, has_base=base is not None, models=sorted(models), writer=writer, on_progress=on_progress)
            tensors = work.run()
        report = MergeReport(output=output, n_bytes=plan.n_bytes, tensors=tensors, warnings=plan.warnings)
        copy_config(plan.reference, to=folder, dtype=plan.dtype)
        copy_tokenizer(tokenizer_of or plan.reference, to=folder)
        _write_reports(report, config=config, models=sorted(models), identity=identity, lineage=lineage, folder=folder)
        durable.publish_new(folder, to=output)
    return report


class _Work:
    """Computes and writes the tensors of a merge, several at the same time, each with one thread."""

    def __init__(
        self,
        config: MergeConfig,
        *,
        plan: MergePlan,
        has_base: bool,
        models: Sequence[str],
        writer: WeightWriter,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self._config, self._plan, self._has_base, self._models = config, plan, has_base, models
        self._writer, self._on_progress = writer, on_progress
        self._done, self._lock, self._stopped = 0, threading.Lock(), threading.Event()

    def run(self) -> tuple[TensorReport, ...]:
        """Merge all tensors; return their results, in the order of the plan."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # also in the threads that are started now
        largest_first = sorted(self._plan.tensors, key=lambda tensor: -tensor.reference.n_positions)
        try:
            with ThreadPoolExecutor(min(threads, _MOST_THREADS)) as pool:
                try:
                    futures = {tensor.name: pool.submit(self._make, tensor) for tensor in largest_first}
                    for finished in as_completed(futures.values()):
                        finished.result()
                except BaseException:
                    self._stopped.set()
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            torch.set_num_threads(threads)
        return tuple(futures[tensor.name].result() for tensor in self._plan.tensors)

    def _make(self, tensor: PlannedTensor) -> TensorReport:
        return self._merged(tensor) if tensor.n_merged else self._copied(tensor, weights={})

    def _merged(self, tensor: PlannedTensor) -> TensorReport:
        blocks = FileBlocks(tensor, has_base=self._has_base, models=self._models, stopped=self._stopped)
        rule = rule_of(self._config, tensor=tensor.name, models=self._models, blocks=blocks, n_positions=tensor.n_merged)
        n_moved = start = 0
        for block in blocks:
            rounded_N = _rounded(rule.apply(block), tensor=tensor)
            n_moved += int(torch.count_nonzero(rounded_N != block.base_N.to(tensor.dtype)))
            self._write(tensor, rounded_N, start=start)
            start += len(rounded_N)
        return self._copied(tensor, weights=dict(zip(self._models, rule.weights, strict=True)), n_moved=n_moved)

    def _copied(self, tensor: PlannedTensor, *, weights: dict[str, float], n_moved: int = 0) -> TensorReport:
        """Copy a tensor that is not merged, and return its result."""
        start = tensor.n_merged
        for piece_N in pieces_of(tensor.reference, start=start):
            self._write(tensor, _rounded(piece_N, tensor=tensor), start=start)
            start += len(piece_N)
        moved = n_moved / max(1, start) if self._has_base else None
        dtype = str(tensor.dtype).removeprefix("torch.")
        return TensorReport(name=tensor.name, shape=tensor.shape, dtype=dtype, weights=weights, moved=moved)

    def _write(self, tensor: PlannedTensor, piece_N: Tensor, *, start: int) -> None:
        self._writer.write(tensor.name, piece_N, start=start)
        with self._lock:
            self._done += piece_N.nbytes
            if self._on_progress is not None:
                self._on_progress(self._done, self._plan.n_bytes)


def _rounded(values_N: Tensor, *, tensor: PlannedTensor) -> Tensor:
    rounded_N = values_N.to(tensor.dtype)
    if rounded_N.is_floating_point() and not is_finite(rounded_N):
        raise DataError(f"{tensor.name}: the merged weights are too large for {tensor.dtype}. Choose another dtype, or a smaller scale.")
    return rounded_N


def _clear_leftovers(output: Path) -> None:
    """Remove files of a killed merge into the same folder."""
    output.parent.mkdir(parents=True, exist_ok=True)
    for path in output.parent.glob(f"{durable.TEMPORARY}*@{escape(output.name)}"):
        if durable.is_abandoned(path):
            durable.discard(path)


def _require_space(folder: Path, *, n_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < n_bytes + _SPARE_BYTES:
        raise DataError(
            f"The free space of {folder} ({free / 1e9:.2f} GB) must be more than the merged model takes ({n_bytes / 1e9:.2f} GB). "
            "Make room, or name a folder on another disk."
        )


def _write_reports(
    report: MergeReport,
    *,
    config: MergeConfig,
    models: list[str],
    identity: Mapping[str, Any],
    lineage: Mapping[str, Any],
    folder: Path,
) -> None:
    settings = config.determines(models)
    tensors = [asdict(tensor) for tensor in report.tensors]
    content = {"identity": identity, "lineage": lineage, "warnings": report.warnings, "tensors": tensors}
    durable.write_json(folder / REPORT, content)
    write_model_card(
        folder,
        name=config.name,
        text=f"Merged by fuseline from {', '.join(models)} ({config.method}). `{REPORT}` has the result for each tensor.",
        tags="fuseline, merge",
        sections={"Lineage": lineage, "Settings": settings},
    )
