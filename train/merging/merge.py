"""Merges the models of several folders into a new one, tensor by tensor and block by block."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from ..weight_files import write_weights
from .config import MergeConfig
from .identity import REPORT
from .methods import rule_of
from .plan import MergePlan, PlannedTensor, pieces_of, plan_merge, ranges
from .rule import Block

_SPARE_BYTES = 64 << 20  # for what is written beside the weights


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReport:
    """What became of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    weights: dict[str, float]  # of the models in this tensor; empty for one that was copied
    moved: float | None  # share of the positions at which it is not the base's; None without a base


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What a merge did; `merge_report.json` in the folder holds it, with identity and lineage."""

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
    """Merge models into a new Hugging Face folder, which appears in one step. The order of the models does not matter.

    Computes in float32 (of float64 weights in float64) and rounds once. Memory is that of a few blocks.

    Args:
        config: the method and its settings.
        base: folder of the model that the others were trained from. Every method but linear needs it; the config of the merged model
            and the rows of its vocabulary that not all models have are the base's.
        models: their folders by name.
        output: the new folder; nothing may be there.
        identity: what `merge_identity` says of this merge; kept in the report, for `merged_before`.
        lineage: what the models were made from, for the model card.
        tokenizer_of: folder that the tokenizer's files are copied from; by default the base, without one the first model by name.
        on_progress: told the bytes that are written and those that there will be.

    Raises:
        UsageError: the settings do not fit the models that were named.
        DataError: the models do not fit each other, or hold what cannot be merged; nothing is left behind.
        FileExistsError: there is something at `output`.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists")
    with ExitStack() as stack:
        plan = plan_merge(config, base=base, models=models, tokenizer_of=tokenizer_of, stack=stack)
        _clear_leftovers(output)
        _require_space(output.parent, n_bytes=plan.n_bytes)
        folder = stack.enter_context(durable.temporary(output))
        folder.mkdir()
        work = _Work(config, plan=plan, has_base=base is not None, models=sorted(models), on_progress=on_progress)
        write_weights(
            work.pieces(),
            shapes={tensor.name: tensor.shape for tensor in plan.tensors},
            dtypes={tensor.name: tensor.dtype for tensor in plan.tensors},
            folder=folder,
        )
        report = MergeReport(output=output, n_bytes=plan.n_bytes, tensors=tuple(work.reports), warnings=plan.warnings)
        copy_config(plan.reference, to=folder, dtype=plan.dtype)
        copy_tokenizer(tokenizer_of or plan.reference, to=folder)
        _write_reports(report, config=config, models=sorted(models), identity=identity, lineage=lineage, folder=folder)
        durable.publish_new(folder, to=output)
    return report


class _Work:
    """Computes the tensors of a merge one after the other, and notes what becomes of each."""

    def __init__(
        self,
        config: MergeConfig,
        *,
        plan: MergePlan,
        has_base: bool,
        models: Sequence[str],
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self.reports: list[TensorReport] = []
        self._config, self._plan, self._has_base, self._models, self._on_progress = config, plan, has_base, models, on_progress

    def pieces(self) -> Iterator[tuple[str, Tensor]]:
        """What is to be written, in the order of the plan."""
        done = 0
        for tensor in self._plan.tensors:
            for piece in self._merged(tensor) if tensor.n_merged else self._copied(tensor):
                done += piece.nbytes
                yield tensor.name, piece
                if self._on_progress is not None:
                    self._on_progress(done, self._plan.n_bytes)

    def _copied(self, tensor: PlannedTensor) -> Iterator[Tensor]:
        if not tensor.reference.n_positions:
            yield torch.empty(0, dtype=tensor.dtype)
        yield from pieces_of(tensor.reference)
        self._note(tensor, weights={}, n_moved=0)

    def _merged(self, tensor: PlannedTensor) -> Iterator[Tensor]:
        blocks = _FileBlocks(tensor, has_base=self._has_base, models=self._models)
        rule = rule_of(self._config, tensor=tensor.name, models=self._models, blocks=blocks, n_positions=tensor.n_merged)
        n_moved = 0
        for block in blocks:
            merged_N = rule.apply(block)
            rounded_N = merged_N.to(tensor.dtype)
            if not _is_finite(rounded_N):
                raise DataError(
                    f"{tensor.name}: the merged weights are too large for {tensor.dtype}. Choose another dtype, or a smaller scale."
                )
            n_moved += int(torch.count_nonzero(rounded_N != block.base_N.to(tensor.dtype)))
            yield rounded_N
        for piece in pieces_of(tensor.reference, start=tensor.n_merged):
            yield piece.to(tensor.dtype)
        self._note(tensor, weights=dict(zip(self._models, rule.weights, strict=True)), n_moved=n_moved)

    def _note(self, tensor: PlannedTensor, *, weights: dict[str, float], n_moved: int) -> None:
        moved = n_moved / max(1, tensor.reference.n_positions) if self._has_base else None
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.reports.append(TensorReport(name=tensor.name, shape=tensor.shape, dtype=dtype, weights=weights, moved=moved))


class _FileBlocks:
    """The blocks of one tensor in all models. They are read anew each time: what was read before is in the system's cache of files."""

    def __init__(self, tensor: PlannedTensor, *, has_base: bool, models: Sequence[str]) -> None:
        self._tensor, self._has_base, self._models = tensor, has_base, models
        all_dtypes = {tensor.reference.dtype, *(model.dtype for model in tensor.models)}
        self._dtype = torch.float64 if torch.float64 in all_dtypes else torch.float32
        self._is_checked = False

    def __iter__(self) -> Iterator[Block]:
        for start, stop in ranges(0, self._tensor.n_merged):
            models_MN = torch.empty((len(self._tensor.models), stop - start), dtype=self._dtype)
            for row_N, model in zip(models_MN, self._tensor.models, strict=True):
                row_N.copy_(model.read(start, stop))
            base_N = self._tensor.reference.read(start, stop).to(self._dtype) if self._has_base else models_MN[0]
            if not self._is_checked:
                self._check(base_N, models_MN)
            yield Block(base_N, models_MN)
        self._is_checked = True

    def _check(self, base_N: Tensor, models_MN: Tensor) -> None:
        rows = [*((f"model {name}", row_N) for name, row_N in zip(self._models, models_MN, strict=True)), ("the base", base_N)]
        for label, values_N in rows:
            if not _is_finite(values_N):
                kind = "NaN" if values_N.isnan().any() else "an infinite number"
                raise DataError(f"{self._tensor.name} of {label} holds {kind}: such weights cannot be merged. Was its training stable?")


def _is_finite(values_N: Tensor) -> bool:
    least, most = torch.aminmax(values_N)
    return bool(torch.isfinite(least) & torch.isfinite(most))


def _clear_leftovers(output: Path) -> None:
    """Remove what a merge into the same folder left that was killed."""
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
        text=f"Merged by fuseline from {', '.join(models)} ({config.method}). `{REPORT}` says what became of each tensor.",
        tags="fuseline, merge",
        sections={"Lineage": lineage, "Settings": settings},
    )
