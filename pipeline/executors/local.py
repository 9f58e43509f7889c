"""Runs the parts of a stage on this machine: in this process, or in several processes that each have a GPU or a share of the cores.

The processes are spawned, never forked, because the Rust libraries (polars, tokenizers) hang in a fork. Each process imports the libraries
and loads the model once. The bits of a part do not depend on the number of processes: with SmolLM2-135M, one and two torch threads give
the same arrays, in float32 and in bfloat16.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

from ...store import journal
from ...store.machine import usable_cores
from .config import ExecutorConfig
from .crew import Answer, Lost, share_out, work_alone
from .ledger import Ledger, require_all
from .work import Assignment, Follow, Stage

# Read by OpenMP (torch, numpy's BLAS), polars, numba and tokenizers when they are loaded.
_THREADS = ("OMP_NUM_THREADS", "POLARS_MAX_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS")


class LocalExecutor:
    """Runs parts in `workers` processes, or in this process if `workers` is 1."""

    def __init__(self, config: ExecutorConfig, *, say: Callable[[str], None]) -> None:
        self.config, self._say, self._gpus = config, say, visible_gpus()

    def run(self, stage: Stage, parts: Sequence[int], *, run_folder: Path, on_commit: Follow) -> None:
        """See `Executor.run`."""
        assignment = Assignment(stage=stage, run_folder=run_folder, directory=Path.cwd())
        ledger = Ledger(parts, retries=self.config.retries, say=self._say)
        size = min(self.config.workers or len(self._gpus) or 1, len(parts))
        if size == 1:  # one worker needs no other process
            work_alone(assignment, ledger, worker="worker-1", on_commit=on_commit)
        else:
            crew = LocalCrew(assignment, size=size, gpus=self._gpus)
            share_out(crew, ledger, size=size, dataset=stage.dataset, on_commit=on_commit)
        require_all(stage.dataset, ledger, run_folder=run_folder)


class LocalCrew:
    """Worker processes of this machine."""

    def __init__(self, assignment: Assignment, *, size: int, gpus: Sequence[str]) -> None:
        self._assignment, self._gpus = assignment, gpus
        threads = str(max(1, usable_cores() // size))
        self._environment = dict.fromkeys(_THREADS, threads) | os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._connections: dict[str, Connection] = {}
        self._slots: dict[str, int] = {}  # worker -> its number among the running workers, which selects its GPU

    def hire(self, worker: str) -> None:
        """Start a process."""
        self._slots[worker] = next(slot for slot in range(len(self._slots) + 1) if slot not in self._slots.values())
        environment = dict(self._environment)
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[self._slots[worker] % len(self._gpus)]
        self._connections[worker], theirs = Pipe()
        with theirs, (self._assignment.run_folder / "logs" / f"{worker}.log").open("ab") as log:
            self._processes[worker] = subprocess.Popen(
                [sys.executable, "-P", "-m", f"{__package__}.local_worker", str(theirs.fileno())],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # the coordinator handles Ctrl-C: it closes the sockets, which stops the workers
            )
        self._send(worker, (self._assignment, worker))

    def give(self, worker: str, part: int | None) -> None:
        """Give a part to a process."""
        self._send(worker, part)

    def wait(self) -> list[tuple[str, Answer]]:
        """Wait until a process answers or dies; its socket shows both at once."""
        ready = wait(list(self._connections.values()))
        return [(worker, self._answer(worker)) for worker, connection in self._connections.items() if connection in ready]

    def dismiss(self, worker: str) -> None:
        """Stop a process at any point: a commit is atomic."""
        if (process := self._processes.pop(worker, None)) is not None:
            process.kill()
            process.wait()
        if (connection := self._connections.pop(worker, None)) is not None:
            connection.close()  # this also stops a process that got no name before a Ctrl-C
        self._slots.pop(worker, None)
        journal.end_of(self._assignment.run_folder, worker=worker)

    def _send(self, worker: str, message: object) -> None:
        try:
            self._connections[worker].send(message)
        except OSError:  # it is dead; `wait` reports that
            return

    def _answer(self, worker: str) -> Answer:
        try:
            return self._connections[worker].recv()
        except (EOFError, OSError):
            return Lost(_last_words(self._processes[worker].wait()))


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as named in CUDA_VISIBLE_DEVICES."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name not in {"", "-1"}]
    if not Path("/dev/nvidiactl").exists():
        return []  # torch takes seconds to load
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def _last_words(returncode: int) -> str:
    if returncode >= 0:
        return f"exit code {returncode}"
    return f"{signal.Signals(-returncode).name}{', perhaps out of memory' if returncode == -signal.SIGKILL else ''}"
