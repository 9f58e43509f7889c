"""The protocol of an executor, and a function that opens one. To add one: a file with its class, its name in `config.py`, a line here."""

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
            stage: the stage to compute; it may be pickled.
            parts: indices of parts that are not there yet.
            run_folder: the run's folder, with the subfolders of `journal.prepare`.
            on_commit: gets the manifest of each part.

        Raises:
            FuselineError: parts failed; the text lists them with their logs. All others are committed.
            DataError: the dataset cannot be written, for example because the disk is full. Committed parts stay.
        """


def open_executor(config: ExecutorConfig, *, say: Callable[[str], None]) -> Executor:
    """Open the executor of a recipe; `say` shows a line to the user.

    Raises:
        UsageError: the executor is not available here; the text says what is missing.
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
