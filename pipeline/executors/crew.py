"""Shares out parts among workers: who is free gets the next, who dies is replaced, and its parts are handed out again."""

import contextlib
import itertools
from dataclasses import dataclass
from typing import Protocol

from ...store.dataset import Dataset
from .ledger import Ledger
from .work import Assignment, Committed, Failed, Follow, Outcome, Worker


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker's answer when it is dead."""

    reason: str


Answer = list[Outcome] | Lost


class Crew(Protocol):
    """Workers of one engine, by name. A worker answers when it is ready (with no outcome), and then once to each part."""

    def hire(self, worker: str) -> None:
        """Start a worker."""

    def give(self, worker: str, part: int | None) -> None:
        """Have a worker do `Worker.step`. It does not wait, and does not mind if the worker is dead."""

    def wait(self) -> list[tuple[str, Answer]]:
        """Wait until a worker answers or dies."""

    def dismiss(self, worker: str) -> None:
        """End a worker, dead or alive, or one that could not be started."""


def share_out(crew: Crew, ledger: Ledger, *, size: int, dataset: Dataset, on_commit: Follow) -> None:
    """Have at most `size` workers make the parts of a ledger; `on_commit` is called in this thread after each."""
    names = (f"worker-{number}" for number in itertools.count(1))
    hired: set[str] = set()
    free: set[str] = set()
    try:
        while not ledger.is_done:
            for worker in sorted(free):
                part = ledger.take(worker)
                if part is not None or ledger.holds(worker):  # else it waits for what the others may not get done
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
        with contextlib.ExitStack() as dismissals:  # all of them, also where one fails
            for worker in hired:
                dismissals.callback(crew.dismiss, worker)


def work_alone(assignment: Assignment, ledger: Ledger, *, worker: str, on_commit: Follow) -> None:
    """Make the parts of a ledger in this process."""
    with Worker(assignment, name=worker) as own:
        while not ledger.is_done:
            _take_in(own.step(ledger.take(worker)), ledger, worker, dataset=assignment.stage.dataset, on_commit=on_commit)


def _take_in(answer: Answer, ledger: Ledger, worker: str, *, dataset: Dataset, on_commit: Follow) -> bool:
    """Take an answer into account; whether the worker is fit for another part."""
    if isinstance(answer, Lost):
        _recover(ledger, worker, reason=answer.reason, dataset=dataset, on_commit=on_commit)
        return False
    for outcome in answer:
        ledger.note(worker, outcome)
        if isinstance(outcome, Committed):
            on_commit(outcome.manifest)
    # An error may leave a process in a bad state (one of CUDA does), so another takes its place.
    return not any(isinstance(outcome, Failed) and outcome.kind == "error" for outcome in answer)


def _recover(ledger: Ledger, worker: str, *, reason: str, dataset: Dataset, on_commit: Follow) -> None:
    """What a dead worker had at hand is there, if it died after the commit, or is handed out again."""
    parts = ledger.lost(worker, reason=reason)
    for part in parts:
        if part in dataset.parts():
            on_commit(dataset.manifest(part))
        else:
            ledger.give_back(part, reason=reason, is_suspect=part == parts[-1])  # those before it were being written
