"""What a worker does, whichever executor started it: compute a part while the one before it is being written."""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, Self

from ...store.dataset import Dataset, PartContent
from ...store.errors import FuselineError
from ...store.journal import Journal, reason_of
from ...store.machine import wait_asleep
from ...store.manifest import Manifest


class Stage(Protocol):
    """A stage is a plain function of a part, and the dataset that its results go into. It pickles as its arguments."""

    dataset: Dataset

    def compute(self, part: int) -> PartContent:
        """Read the part's inputs and compute its content."""


# A user's mistake fails again and again; a folder that cannot be written fails every part; an error may have been an accident.
FailureKind = Literal["mistake", "unwritable", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """A part is there."""

    manifest: Manifest

    @property
    def part(self) -> int:
        """Its index."""
        return self.manifest.part


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """An attempt at a part came to nothing."""

    part: int
    reason: str
    kind: FailureKind


Outcome = Committed | Failed
Follow = Callable[[Manifest], None]  # is told of each part that is committed


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """All that a worker needs to know. It travels to it as a pickle."""

    stage: Stage
    run_folder: Path
    directory: Path  # the coordinator's, to which the stage's paths may be relative


class Worker:
    """Makes the parts it is handed. It never opens the catalog: what it has done it says by manifests, its journal, and its answers."""

    def __init__(self, assignment: Assignment, *, name: str) -> None:
        os.chdir(assignment.directory)
        wait_asleep()
        self.stage = assignment.stage
        self._journal = Journal(assignment.run_folder, worker=name)
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit")
        self._pending: tuple[int, Future[Manifest]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._journal, self._writer:  # a write that has begun is finished
            self._written()

    def step(self, part: int | None) -> list[Outcome]:
        """Compute a part, and say what became of the one before it, which was being written meanwhile; None only waits for that write.

        An attempt that fails is an outcome, with its traceback in the part's log; nothing is at hand then.
        """
        if part is None:
            return self._written()
        self._journal.begun(part)
        started = time.monotonic()
        try:
            content = self.stage.compute(part)
        except Exception as error:  # a stage runs models' and other libraries' code, which raises anything
            return [*self._written(), self._failed(part, error, kind=_kind(error))]
        seconds = time.monotonic() - started
        outcomes = self._written()
        self._pending = part, self._writer.submit(self.stage.dataset.commit, part, content=content, seconds=seconds)
        return outcomes

    def _written(self) -> list[Outcome]:
        if self._pending is None:
            return []
        (part, pending), self._pending = self._pending, None
        try:
            manifest = pending.result()
        except Exception as error:
            is_unwritable = isinstance(error, OSError) and not isinstance(error, FuselineError | FileNotFoundError)
            return [self._failed(part, error, kind="unwritable" if is_unwritable else _kind(error))]
        self._journal.committed(part)
        return [Committed(manifest=manifest)]

    def _failed(self, part: int, error: Exception, *, kind: FailureKind) -> Failed:
        self._journal.failed(part, error)
        return Failed(part=part, reason=reason_of(error), kind=kind)


def _kind(error: Exception) -> FailureKind:
    return "mistake" if isinstance(error, FuselineError) else "error"
