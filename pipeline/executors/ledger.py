"""Records the state of each part: waiting, at a worker, or done, and how often it failed. It does no work itself."""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ...store.dataset import Dataset
from ...store.errors import DataError, FuselineError
from ...store.journal import failure_log
from .work import Committed, Failed, Outcome

MOST_DEATHS = 10  # of workers that worked on the same part: the part may be the cause
MOST_SETBACKS = 20  # consecutive errors and deaths without a commit: the parts are not the cause


class Ledger:
    """Assigns each part to one worker at a time, until it is committed or has failed too often."""

    def __init__(
        self, parts: Sequence[int], *, retries: int, deaths: Mapping[int, int] | None = None, say: Callable[[str], None] = lambda text: None
    ) -> None:
        """`deaths` says how many workers died before while they worked on a part; `say` shows each failure."""
        self._retries, self._say = retries, say
        self._held: dict[str, list[int]] = {}
        self._errors: Counter[int] = Counter()
        self._deaths: Counter[int] = Counter(deaths or {})
        self._setbacks = 0
        self._reasons: dict[int, str] = {}  # part -> its last failure
        self.failed = {  # part -> why it is not tried again
            part: f"its worker died, or ran out of time ({n} times)" for part in parts if (n := self._deaths[part]) >= MOST_DEATHS
        }
        self._waiting = deque(part for part in parts if part not in self.failed)
        self.unwritable: str | None = None  # the reason why no part can be committed

    @property
    def n_waiting(self) -> int:
        """Number of parts that no worker has."""
        return len(self._waiting)

    @property
    def is_done(self) -> bool:
        """Whether every part is committed, or has failed permanently."""
        return not self._waiting and not self._held

    def holds(self, worker: str) -> bool:
        """Whether a worker has parts to work on."""
        return worker in self._held

    def take(self, worker: str) -> int | None:
        """Assign the next part to a worker; None if no part is waiting."""
        if not self._waiting:
            return None
        part = self._waiting.popleft()
        self._held.setdefault(worker, []).append(part)
        return part

    def note(self, worker: str, outcome: Outcome) -> None:
        """Record the outcome of a part from a worker."""
        self._release(worker, outcome.part)
        if isinstance(outcome, Committed):
            self._reasons.pop(outcome.part, None)
            self._setbacks = 0
        elif outcome.kind == "unwritable":
            self.unwritable = outcome.reason
            self._waiting.clear()
        else:
            self._attempt_failed(outcome)

    def lost(self, worker: str, *, reason: str) -> list[int]:
        """Record that a worker died, and return its parts. The caller must call `give_back` for each part that is not committed."""
        self._say(f"{worker} died ({reason})")
        self._setback(f"{worker} died ({reason})")
        return self._held.pop(worker, [])

    def give_back(self, part: int, *, reason: str, is_suspect: bool = True) -> None:
        """Take back a part that a dead worker did not commit. It is a suspect if the worker was computing it, not writing it."""
        if not is_suspect:
            self._waiting.appendleft(part)
            return
        self._deaths[part] += 1
        self._again(part, f"its worker died ({reason})", is_last=self._deaths[part] >= MOST_DEATHS, times=self._deaths[part])

    def _attempt_failed(self, outcome: Failed) -> None:
        if outcome.kind == "mistake":
            self.failed[outcome.part] = outcome.reason
            return
        self._errors[outcome.part] += 1
        self._setback(outcome.reason)
        is_last = self._errors[outcome.part] > self._retries
        self._again(outcome.part, outcome.reason, is_last=is_last, times=self._errors[outcome.part])

    def _again(self, part: int, reason: str, *, is_last: bool, times: int) -> None:
        self._reasons[part] = f"{reason} ({times} time{'s' * (times != 1)})"
        self._say(f"part {part}: {self._reasons[part]}{'' if is_last else '; trying it again'}")
        if is_last or self._gives_up:
            self.failed[part] = self._reasons[part]
        else:
            self._waiting.append(part)  # at the end, after the other parts

    @property
    def _gives_up(self) -> bool:
        return self._setbacks >= MOST_SETBACKS

    def _setback(self, reason: str) -> None:
        self._setbacks += 1
        if self._gives_up:
            untried = f"not tried, after {self._setbacks} consecutive failures; the last: {reason}"
            self.failed |= {part: self._reasons.get(part, untried) for part in self._waiting}
            self._waiting.clear()

    def _release(self, worker: str, part: int) -> None:
        self._held[worker].remove(part)
        if not self._held[worker]:
            del self._held[worker]


def require_all(dataset: Dataset, ledger: Ledger, *, run_folder: Path) -> None:
    """Raise if parts failed.

    Raises:
        DataError: the dataset's folder cannot be written.
        FuselineError: parts failed; the text lists them, with the reason and the log of each.
    """
    if ledger.unwritable is not None:
        raise DataError(
            f"{dataset.folder} cannot be written: {ledger.unwritable}. Free disk space, or fix the permissions of the folder, and run the "
            "same command again. Committed parts are safe."
        )
    if ledger.failed:
        raise parts_failed(dataset, ledger.failed, run_folder=run_folder)


def parts_failed(dataset: Dataset, failed: Mapping[int, str], *, run_folder: Path) -> FuselineError:
    """The error that lists failed parts by reason."""
    by_reason: dict[str, list[int]] = {}
    for part, reason in sorted(failed.items()):
        by_reason.setdefault(reason, []).append(part)
    lines = "\n".join(f"  {_listed(parts)}: {reason}{_see(parts, run_folder=run_folder)}" for reason, parts in by_reason.items())
    count = f"{len(failed)} part{'s' * (len(failed) != 1)}"
    return FuselineError(
        f"{dataset.kind}/{dataset.name}: {count} failed; all others are done.\n{lines}\n"
        "Run the same command again to make only the missing parts."
    )


def _listed(parts: Sequence[int]) -> str:
    shown = ", ".join(map(str, parts[:10])) + (f" and {len(parts) - 10} more" if len(parts) > 10 else "")
    return f"part{'s' * (len(parts) != 1)} {shown}"


def _see(parts: Sequence[int], *, run_folder: Path) -> str:
    logs = [failure_log(run_folder, part) for part in parts if failure_log(run_folder, part).exists()]
    return f"\n    log: {logs[0]}" if logs else f"\n    logs: {run_folder / 'logs'}"
