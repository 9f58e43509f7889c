"""Runs the parts of a stage on an existing Ray cluster: an actor per worker. An actor keeps the stage, so it loads the model once.

Every machine of the cluster must have fuseline installed, and must see the workspace and the models under the same paths.
"""

import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...store import journal
from ...store.errors import UsageError
from .config import ExecutorConfig, Resources
from .crew import Answer, Lost, share_out
from .ledger import Ledger, require_all
from .work import Assignment, Follow, Outcome, Stage, Worker

try:
    import ray
except ImportError as error:
    raise UsageError("Install Ray for --executor ray, in the version of the cluster: pip install 'fuseline[ray]'.") from error

_DEFAULT_WORKERS = 4
_PATIENCE_SECONDS = 30.0  # before the message that the cluster has no free resources


class RayExecutor:
    """Runs parts on `workers` actors."""

    def __init__(self, config: ExecutorConfig, *, say: Callable[[str], None]) -> None:
        """Connect to the cluster, until this process ends.

        Raises:
            UsageError: there is no cluster.
        """
        self.config, self._say = config, say
        address = os.environ.get("RAY_ADDRESS", "auto")
        try:
            _knock(address)
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            raise UsageError(
                f"The Ray cluster at {'this machine' if address == 'auto' else address} cannot be used: {journal.reason_of(error)}. "
                "Start one with `ray start --head`, or name one with RAY_ADDRESS."
            ) from error

    def run(self, stage: Stage, parts: Sequence[int], *, run_folder: Path, on_commit: Follow) -> None:
        """See `Executor.run`."""
        assignment = Assignment(stage=stage, run_folder=run_folder, directory=Path.cwd())
        ledger = Ledger(parts, retries=self.config.retries, say=self._say)
        crew = RayCrew(assignment, resources=self.config.resources.of(stage.dataset.kind), say=self._say)
        size = min(self.config.workers or _DEFAULT_WORKERS, len(parts))
        share_out(crew, ledger, size=size, dataset=stage.dataset, on_commit=on_commit)
        require_all(stage.dataset, ledger, run_folder=run_folder)


def _knock(address: str) -> None:
    """Raise OSError or ValueError if no server listens at an address, because Ray would retry for many minutes."""
    if address != "auto":
        host, _, port = address.rpartition("://")[2].rpartition(":")
        socket.create_connection((host, int(port)), timeout=10).close()


class RayCrew:
    """Actors on a Ray cluster."""

    def __init__(self, assignment: Assignment, *, resources: Resources, say: Callable[[str], None]) -> None:
        self._run_folder, self._say = assignment.run_folder, say
        self._assignment = ray.put(assignment)
        memory = None if resources.memory_gb is None else int(resources.memory_gb * 1e9)
        self._asked_for = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "memory": memory}
        self._actors: dict[str, Any] = {}
        self._answers: dict[str, Any] = {}  # worker -> reference to its next answer
        self._has_begun = False

    def hire(self, worker: str) -> None:
        """Start an actor; it answers when the cluster has resources for it."""
        # Ray must not restart it: Ray does not know the part that it works on.
        self._actors[worker] = ray.remote(_Actor).options(max_restarts=0, **self._asked_for).remote(self._assignment, worker)
        self._answers[worker] = self._actors[worker].is_ready.remote()

    def give(self, worker: str, part: int | None) -> None:
        """Give a part to an actor."""
        self._answers[worker] = self._actors[worker].step.remote(part)

    def wait(self) -> list[tuple[str, Answer]]:
        """Wait until an actor answers or dies."""
        references = {reference: worker for worker, reference in self._answers.items()}
        ready, _ = ray.wait(list(references), num_returns=1, timeout=None if self._has_begun else _PATIENCE_SECONDS)
        if not ready:
            free = {name: amount for name, amount in ray.available_resources().items() if name in {"CPU", "GPU", "memory"}}
            self._say(f"Ray has no resources for a worker yet: each needs {self._asked_for}, and the cluster has {free} free.")
        self._has_begun = self._has_begun or bool(ready)
        return [(references[reference], self._answer(references[reference])) for reference in ready]

    def dismiss(self, worker: str) -> None:
        """Stop an actor at any point: a commit is atomic."""
        self._answers.pop(worker, None)
        if (actor := self._actors.pop(worker, None)) is not None:
            ray.kill(actor)
        journal.end_of(self._run_folder, worker=worker)

    def _answer(self, worker: str) -> Answer:
        try:
            return ray.get(self._answers.pop(worker))
        except ray.exceptions.RayError as error:
            return Lost(journal.reason_of(error))


class _Actor:
    """A worker in an actor's process."""

    def __init__(self, assignment: Assignment, name: str) -> None:
        os.chdir(assignment.directory)
        with (assignment.run_folder / "logs" / f"{name}.log").open("ab") as log:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(log.fileno(), stream.fileno())
        self._worker = Worker(assignment, name=name)

    def is_ready(self) -> list[Outcome]:
        return []

    def step(self, part: int | None) -> list[Outcome]:
        return self._worker.step(part)
