"""The main function of one rank: hold the run folder's lock, train, and report errors as one line and an exit code."""

import contextlib
import ctypes
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ..store import durable
from ..store.errors import FuselineError, UsageError, WorkspaceBusy
from ..store.machine import wait_asleep
from . import records
from .config import TrainJob

ERROR_PREFIX = "fuseline.train: error: "
_PR_SET_PDEATHSIG = 1


def main(run_folder: Path) -> int:
    """Run one rank of the job in a run folder; returns the exit code."""
    die_with_parent()
    wait_asleep()
    try:
        if "RANK" not in os.environ:
            raise UsageError("Start the ranks with torchrun: torchrun --nproc-per-node N -m fuseline.train RUN_FOLDER")
        train_rank(TrainJob.load(run_folder))
    except FuselineError as error:
        print(f"{ERROR_PREFIX}{error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def train_rank(job: TrainJob) -> None:
    """Train as the rank in the environment.

    Raises:
        FuselineError: anything that the user can fix; also after a SIGTERM, when a checkpoint was saved.
    """
    with _locked(job.run_folder) if os.environ["RANK"] == "0" else contextlib.nullcontext():
        # Imported here because it takes seconds, and a busy folder must be refused at once.
        from .runtime import open_runtime
        from .trainer import Trainer

        with open_runtime(job.config, choose_arithmetic=partial(choose_arithmetic, job)) as runtime:
            Trainer(job, runtime=runtime).run()


def choose_arithmetic(job: TrainJob) -> str:
    """The number format of a run's computation, stored in its folder: the run keeps it when it continues on another machine."""
    arithmetic = records.arithmetic_of(job.run_folder, dtype=job.config.dtype)
    records.write_machine(job.run_folder, dtype=job.config.dtype, arithmetic=arithmetic)
    return arithmetic


def die_with_parent() -> None:
    """Let the kernel end this process when its parent dies, so that a killed launcher leaves no ranks behind (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def _locked(run_folder: Path) -> Iterator[None]:
    with durable.open_lock(run_folder / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkspaceBusy(f"Another trainer is running in {run_folder}. Wait for it, or stop it.") from None
        yield
