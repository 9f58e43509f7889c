"""Starts a training job as ranks on this machine, follows its metrics, and reports a failure as one error."""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..store.errors import FuselineError
from ..store.machine import usable_cores
from . import records
from .config import TrainJob
from .rank import ERROR_PREFIX
from .ranks import Ranks

_POLL_SECONDS = 0.2


def launch(job: TrainJob, *, on_metrics: Callable[[records.Record], None]) -> None:
    """Train a job to its end, from its newest checkpoint if it has one. Returns at once if it is already finished.

    Args:
        job: what to train; written to `job.json` in its run folder.
        on_metrics: called with each new record of `metrics.jsonl`, in this thread.

    Raises:
        FuselineError: the training failed or was stopped; the text says why, and where the log is.
        FingerprintMismatch: the run folder holds a training with different settings.
    """
    done = records.read_done(job.run_folder)
    if done is not None:
        records.require_identity(job.run_folder, stored=done["identity"], asked=job.identity)
        if (job.export_folder / "config.json").exists():
            return
    job.save()
    logs = job.run_folder / "logs" / time.strftime("%Y%m%d-%H%M%S")
    logs.mkdir(parents=True)
    follower = _Follower(job.run_folder)
    command = [sys.executable, "-P", "-m", f"{__package__}", str(job.run_folder)]  # -P: no module of the current folder is imported
    with Ranks(command, n=job.config.world_size, environment=_environment(job), logs=logs) as ranks:
        with _stopping(ranks, run_folder=job.run_folder):
            while ranks.are_running():
                time.sleep(_POLL_SECONDS)
                for record in follower.new_records():
                    on_metrics(record)
        for record in follower.new_records():
            on_metrics(record)
        if ranks.first_failed is not None or records.read_done(job.run_folder) is None:
            raise _failure(job, logs=ranks.logs)


def _environment(job: TrainJob) -> dict[str, str]:
    """The environment of each rank. The cores are divided, because ranks that share cores slow each other down. Logs are always UTF-8."""
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, usable_cores() // job.config.world_size)))
    return {"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}


@contextlib.contextmanager
def _stopping(ranks: Ranks, *, run_folder: Path) -> Iterator[None]:
    """On a signal or an error, ask the ranks for a last checkpoint and wait for it; a second Ctrl-C ends them at once.

    The signals are Ctrl-C, SIGTERM, and SIGUSR1, with which Slurm can announce the end of a job's time.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()  # only the main thread may handle signals
    before = {number: signal.signal(number, _exit) for number in (signal.SIGTERM, signal.SIGUSR1)} if in_main_thread else {}
    try:
        yield
    except BaseException:
        print("Stopping after this step with a checkpoint. Press Ctrl-C again to stop at once.", file=sys.stderr, flush=True)
        ranks.ask_to_stop()
        while ranks.are_running():
            time.sleep(_POLL_SECONDS)
        step = records.last_checkpoint(run_folder)
        if step is not None and records.read_done(run_folder) is None:
            print(f"The checkpoint of step {step} is saved. Run the same command to continue.", file=sys.stderr, flush=True)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit(number: int, _: object) -> None:
    sys.exit(128 + number)


class _Follower:
    """Reads the records that rank 0 appends to metrics.jsonl."""

    def __init__(self, run_folder: Path) -> None:
        self._path = run_folder / "metrics.jsonl"
        self._resumed_from = records.last_checkpoint(run_folder) or 0
        self._stale = self._inode()  # the trainer replaces the file before it appends to it
        self._offset = 0

    def new_records(self) -> Iterator[records.Record]:
        """Records of steps since the follower was made."""
        if self._inode() in (None, self._stale):
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                record = json.loads(line)
                if record["step"] > self._resumed_from:
                    yield record

    def _inode(self) -> int | None:
        return self._path.stat().st_ino if self._path.exists() else None


def _failure(job: TrainJob, *, logs: Sequence[Path]) -> FuselineError:
    for path in logs:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines:
            if line.startswith(ERROR_PREFIX):
                return FuselineError(f"{line.removeprefix(ERROR_PREFIX)} (log: {path})")
    for path in logs:
        last = _telling_line(path)
        if last:
            return FuselineError(f"The training of {job.config.name} failed: {last} (log: {path})")
    return FuselineError(f"The training of {job.config.name} failed without a message (logs: {logs[0].parent})")


def _telling_line(path: Path) -> str | None:
    """The last line that looks like the last line of a traceback."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception|Interrupt|Killed)\b", line)), None)
