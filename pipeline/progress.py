"""Progress: a live bar on a terminal, plain lines in a pipe or a batch job."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import rich.progress

from .rich_console import Console

_PLAIN_SECONDS = 10.0  # between two plain lines of one stage


class Tracker(Protocol):
    """Follows one stage."""

    def __call__(self, done: float, figures: str, *, earlier: float = 0.0) -> None:
        """Report that `done` more units are done. `figures` has rates and the like; `earlier` units were done before this session."""


class Progress:
    """Shows the progress of the stages on a terminal or in a log."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(sys.stderr)

    def say(self, text: str) -> None:
        """Show a line."""
        self.console.print(text, soft_wrap=True)

    @contextmanager
    def stage(self, title: str, *, total: float) -> Iterator[Tracker]:
        """Follow a stage of `total` units of work."""
        follow = self._live if self.console.is_terminal else self._plain
        with follow(title, total) as tracker:
            yield tracker

    @contextmanager
    def writing(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """Follow a file that is written. Call the result with the bytes so far and the total."""
        with self.stage(title, total=1.0) as tracker:
            before = 0

            def follow(done: int, total: int) -> None:
                nonlocal before
                tracker((done - before) / max(total, 1), f"{size(done)} written")
                before = done

            yield follow

    @contextmanager
    def _live(self, title: str, total: float) -> Iterator[Tracker]:
        columns = (
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.TaskProgressColumn(),
            rich.progress.TextColumn("{task.fields[figures]}", markup=False),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("left"),
            rich.progress.TimeRemainingColumn(elapsed_when_finished=False),
        )
        with rich.progress.Progress(*columns, console=self.console) as live:
            task = live.add_task(title, total=total, figures="")

            def tracker(done: float, figures: str, *, earlier: float = 0.0) -> None:
                if earlier:
                    live.reset(task, figures=figures)
                    live.update(task, completed=earlier)
                live.update(task, advance=done, figures=figures)

            yield tracker

    @contextmanager
    def _plain(self, title: str, total: float) -> Iterator[Tracker]:
        started = said = time.monotonic()
        so_far = before = 0.0
        self.say(f"{title}: started")

        def tracker(done: float, figures: str, *, earlier: float = 0.0) -> None:
            nonlocal so_far, before, said
            before += earlier
            so_far += done + earlier
            now = time.monotonic()
            if now - said < _PLAIN_SECONDS and so_far < total:
                return
            said = now
            left = f", {duration((now - started) * (total - so_far) / (so_far - before))} left" if so_far > before else ""
            self.say(f"{title}: {so_far / total:.0%}, {figures}, {duration(now - started)} passed{left}")

        yield tracker


def duration(seconds: float) -> str:
    """A time as hours, minutes and seconds: `1:02:03`, `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(n_bytes: float) -> str:
    """A number of bytes in the largest unit that fits: `3.2 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"
