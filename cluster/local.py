"""Runs the parts of a stage in this process: computing, with the write of the part before it going on beside."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from ..store.dataset import Dataset, Manifest, PartContent
from ..store.errors import DataError


class Stage(Protocol):
    """A stage is a plain function of a part, and the dataset that its results go into."""

    dataset: Dataset

    def compute(self, part: int) -> PartContent:
        """Read the part's inputs and compute its content."""


def run_parts(stage: Stage, parts: Sequence[int], *, on_commit: Callable[[Manifest], None]) -> None:
    """Compute and commit parts in order; `on_commit` is called in this thread after each.

    Raises:
        DataError: a part cannot be written (a full disk, say). What was committed before stays.
    """
    pending: Future[Manifest] | None = None
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit") as writer:
        for part in parts:
            started = time.monotonic()
            content = stage.compute(part)
            seconds = time.monotonic() - started
            if pending is not None:
                on_commit(_committed(pending, stage.dataset))
            pending = writer.submit(stage.dataset.commit, part, content=content, seconds=seconds)
        if pending is not None:
            on_commit(_committed(pending, stage.dataset))


def _committed(pending: "Future[Manifest]", dataset: Dataset) -> Manifest:
    try:
        return pending.result()
    except OSError as error:
        raise DataError(
            f"{dataset.folder} cannot be written: {error.strerror or error}. What was committed before is safe; make room, or give the "
            "folder back its permissions, and run the same command again."
        ) from error
