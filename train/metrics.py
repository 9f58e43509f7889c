"""Writes what a run tells of itself: a record per step, the evaluations, and both again as TensorBoard events."""

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
    """The files of one run, on the rank that leads. They go on from `step`; what they hold of later steps is forgotten."""

    def __init__(self, run_folder: Path, *, step: int) -> None:
        for name in records.RECORD_FILES:
            records.cut(run_folder / name, step=step or -1)  # at the start the start is evaluated once more
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
        """The records of an evaluation, one for each domain."""
        for record in found:
            _append(self._evaluations, record)
            self._events.add_scalar(f"held_out_bpb/{record['domain']}", record["bpb"], record["step"])


def _opened(path: Path) -> TextIO:
    return path.open("a", encoding="utf-8")


def _append(file: TextIO, record: Record) -> None:
    file.write(json.dumps(record) + "\n")
    file.flush()
    os.fsync(file.fileno())  # a checkpoint must not outlive the records of its steps
