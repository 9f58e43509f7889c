"""The work of a worker of any executor: it computes a part while the previous part is written."""

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
    """A stage: a plain function of a part, and the dataset for its results. It is pickled as its arguments."""

    dataset: Dataset

    def compute(self, part: int) -> PartContent:
        """Read a part's inputs and compute its content."""


# "mistake": a user's mistake, which fails each time; "unwritable": no part can be written; "error": another attempt may succeed.
FailureKind = Literal["mistake", "unwritable", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """A part is committed."""

    manifest: Manifest

    @property
    def part(self) -> int:
        """The index of the part."""
        return self.manifest.part


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """An attempt at a part failed."""

    part: int
    reason: str
    kind: FailureKind


Outcome = Committed | Failed
Follow = Callable[[Manifest], None]  # called with the manifest of each committed part


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Everything that a worker needs. It is sent to the worker as a pickle."""

    stage: Stage
    run_folder: Path
    directory: Path  # of the coordinator; the stage's paths may be relative to it


class Worker:
    """Makes the parts that it gets. It never opens the catalog; it reports through manifests, its journal, and its answers."""

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
        with self._journal, self._writer:  # finishes a write that has started
            self._written()

    def step(self, part: int | None) -> list[Outcome]:
        """Compute a part, and return the outcome of the previous part, which is written meanwhile. With None, only wait for that write.

        A failed attempt is also an outcome; its traceback is in the part's log. The worker then has no part to work on.
        """
        if part is None:
            return self._written()
        self._journal.begun(part)
        started = time.monotonic()
        try:
            content = self.stage.compute(part)
        except Exception as error:  # code of models and libraries may raise any exception
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
