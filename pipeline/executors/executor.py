"""The one thing that an executor does, and which there are. To add one: a file with such a class, its name in `config.py`, a line here."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from .config import ExecutorConfig
from .work import Follow, Stage


class Executor(Protocol):
    """Runs the parts of a stage somewhere."""

    def run(self, stage: Stage, parts: Sequence[int], *, run_folder: Path, on_commit: Follow) -> None:
        """Have parts computed and committed; `on_commit` is called in this thread after each.

        Args:
            stage: what to compute; it may be pickled.
            parts: indices of parts that are not there yet.
            run_folder: the run's folder, with the subfolders of `journal.prepare`.
            on_commit: is told the manifest of each part.

        Raises:
            FuselineError: parts failed; the text lists them with their logs. All others are committed.
            DataError: the dataset cannot be written (a full disk, say). What was committed before stays.
        """


def open_executor(config: ExecutorConfig, *, say: Callable[[str], None]) -> Executor:
    """The executor that a recipe asks for; `say` takes a line for the user.

    Raises:
        UsageError: it cannot be had here; the text says what is missing.
    """
    match config.kind:
        case "slurm":
            from .slurm import SlurmExecutor

            return SlurmExecutor(config, say=say)
        case "ray":
            from .ray import RayExecutor

            return RayExecutor(config, say=say)
        case _:
            from .local import LocalExecutor

            return LocalExecutor(config, say=say)
