"""Distributes parts among workers. A free worker gets the next part. A dead worker is replaced, and its parts are assigned again."""

import contextlib
import itertools
from dataclasses import dataclass
from typing import Protocol

from ...store.dataset import Dataset
from .ledger import Ledger
from .work import Assignment, Committed, Failed, Follow, Outcome, Worker


@dataclass(frozen=True, slots=True)
class Lost:
    """The answer of a worker that died."""

    reason: str


Answer = list[Outcome] | Lost


class Crew(Protocol):
    """Workers of one engine, by name. A worker answers when it is ready (with no outcome), and then once for each part."""

    def hire(self, worker: str) -> None:
        """Start a worker."""

    def give(self, worker: str, part: int | None) -> None:
        """Have a worker do `Worker.step`. The call does not wait, and does nothing if the worker is dead."""

    def wait(self) -> list[tuple[str, Answer]]:
        """Wait until a worker answers or dies."""

    def dismiss(self, worker: str) -> None:
        """Stop a worker. It may be dead already, or may never have started."""


def share_out(crew: Crew, ledger: Ledger, *, size: int, dataset: Dataset, on_commit: Follow) -> None:
    """Have at most `size` workers make the parts of a ledger; `on_commit` is called in this thread after each."""
    names = (f"worker-{number}" for number in itertools.count(1))
    hired: set[str] = set()
    free: set[str] = set()
    try:
        while not ledger.is_done:
            for worker in sorted(free):
                part = ledger.take(worker)
                if part is not None or ledger.holds(worker):  # else it stays free for parts that other workers do not finish
                    free.discard(worker)
                    crew.give(worker, part)
            while len(hired) < size and ledger.n_waiting > sum(not ledger.holds(worker) for worker in hired):
                worker = next(names)
                hired.add(worker)
                crew.hire(worker)
            for worker, answer in crew.wait():
                if _take_in(answer, ledger, worker, dataset=dataset, on_commit=on_commit):
                    free.add(worker)
                else:
                    crew.dismiss(worker)
                    hired.discard(worker)
                    free.discard(worker)
    finally:
        with contextlib.ExitStack() as dismissals:  # all workers, even if one dismissal fails
            for worker in hired:
                dismissals.callback(crew.dismiss, worker)


def work_alone(assignment: Assignment, ledger: Ledger, *, worker: str, on_commit: Follow) -> None:
    """Make the parts of a ledger in this process."""
    with Worker(assignment, name=worker) as own:
        while not ledger.is_done:
            _take_in(own.step(ledger.take(worker)), ledger, worker, dataset=assignment.stage.dataset, on_commit=on_commit)


def _take_in(answer: Answer, ledger: Ledger, worker: str, *, dataset: Dataset, on_commit: Follow) -> bool:
    """Process an answer. Return whether the worker can take another part."""
    if isinstance(answer, Lost):
        _recover(ledger, worker, reason=answer.reason, dataset=dataset, on_commit=on_commit)
        return False
    for outcome in answer:
        ledger.note(worker, outcome)
        if isinstance(outcome, Committed):
            on_commit(outcome.manifest)
    # An error may leave a process in a bad state (a CUDA error does), so a new process replaces it.
    return not any(isinstance(outcome, Failed) and outcome.kind == "error" for outcome in answer)


def _recover(ledger: Ledger, worker: str, *, reason: str, dataset: Dataset, on_commit: Follow) -> None:
    """Check the parts that a dead worker worked on. Take a committed part as done, and assign the others again."""
    parts = ledger.lost(worker, reason=reason)
    for part in parts:
        if part in dataset.parts():
            on_commit(dataset.manifest(part))
        else:
            ledger.give_back(part, reason=reason, is_suspect=part == parts[-1])  # the parts before it were being written
