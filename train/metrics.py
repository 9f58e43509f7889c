"""Writes the metrics of a run: a record per step, the evaluations, and both also as TensorBoard events."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from torch.utils.tensorboard import SummaryWriter

from . import records
from .records import Record

_NOT_PLOTTED = {"step", "steps", "warning"}


class Metrics:
    """The files of one run, on the leading rank. They continue from `step`; records of later steps are removed."""

    def __init__(self, run_folder: Path, *, step: int) -> None:
        for name in records.RECORD_FILES:
            records.cut(run_folder / name, step=step or -1)  # a run from step 0 evaluates the start again
        self._steps, self._evaluations = (_opened(run_folder / name) for name in records.RECORD_FILES)
        self._events = SummaryWriter(str(run_folder / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in (self._steps, self._evaluations, self._events):
            file.close()

    def add(self, record: Record) -> None:
        """A step's record."""
        _append(self._steps, record)
        for name, value in record.items():
            if name not in _NOT_PLOTTED and value is not None:
                self._events.add_scalar(name, value, record["step"])

    def add_evaluation(self, found: list[Record]) -> None:
        """Write the records of an evaluation, one per domain."""
        for record in found:
            _append(self._evaluations, record)
            self._events.add_scalar(f"held_out_bpb/{record['domain']}", record["bpb"], record["step"])


def _opened(path: Path) -> TextIO:
    return path.open("a", encoding="utf-8")


def _append(file: TextIO, record: Record) -> None:
    file.write(json.dumps(record) + "\n")
    file.flush()
    os.fsync(file.fileno())  # a checkpoint must not outlive the records of its steps
