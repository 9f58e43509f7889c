"""Who has which part: what waits, what is at a worker, what is done, and how often which part came to nothing. Only bookkeeping."""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ...store.dataset import Dataset
from ...store.errors import DataError, FuselineError
from ...store.journal import failure_log
from .work import Committed, Failed, Outcome

MOST_DEATHS = 10  # of workers with the same part at hand: it may be the part that kills them
MOST_SETBACKS = 20  # errors and deaths one after another, with nothing committed between: the trouble is not with the parts


class Ledger:
    """Hands out each part to one worker at a time, until it is committed or has failed too often."""

    def __init__(
        self, parts: Sequence[int], *, retries: int, deaths: Mapping[int, int] | None = None, say: Callable[[str], None] = lambda text: None
    ) -> None:
        """`deaths` says how many workers died before with a part at hand; `say` is told of each setback."""
        self._retries, self._say = retries, say
        self._held: dict[str, list[int]] = {}
        self._errors: Counter[int] = Counter()
        self._deaths: Counter[int] = Counter(deaths or {})
        self._setbacks = 0
        self._reasons: dict[int, str] = {}  # part -> its last setback
        self.failed = {  # part -> why it is not tried again
            part: f"its worker died, or ran out of time ({n} times)" for part in parts if (n := self._deaths[part]) >= MOST_DEATHS
        }
        self._waiting = deque(part for part in parts if part not in self.failed)
        self.unwritable: str | None = None  # why nothing can be committed

    @property
    def n_waiting(self) -> int:
        """Parts that no worker has."""
        return len(self._waiting)

    @property
    def is_done(self) -> bool:
        """Whether every part is committed, or has failed for good."""
        return not self._waiting and not self._held

    def holds(self, worker: str) -> bool:
        """Whether a worker has parts at hand."""
        return worker in self._held

    def take(self, worker: str) -> int | None:
        """Hand the next part to a worker; None if none waits."""
        if not self._waiting:
            return None
        part = self._waiting.popleft()
        self._held.setdefault(worker, []).append(part)
        return part

    def note(self, worker: str, outcome: Outcome) -> None:
        """Take the outcome of one of a worker's parts into account."""
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
        """A worker died: the parts it had, which must be looked for before they are handed out again with `give_back`."""
        self._say(f"{worker} died ({reason})")
        self._setback(f"{worker} died ({reason})")
        return self._held.pop(worker, [])

    def give_back(self, part: int, *, reason: str, is_suspect: bool = True) -> None:
        """A part whose worker died did not get committed. It is a suspect if it was being computed, not written."""
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
        self._say(f"part {part}: {self._reasons[part]}{'' if is_last else '; it is tried again'}")
        if is_last or self._gives_up:
            self.failed[part] = self._reasons[part]
        else:
            self._waiting.append(part)  # at the end: the other parts come first

    @property
    def _gives_up(self) -> bool:
        return self._setbacks >= MOST_SETBACKS

    def _setback(self, reason: str) -> None:
        self._setbacks += 1
        if self._gives_up:
            untried = f"not tried, after {self._setbacks} setbacks one after another; the last: {reason}"
            self.failed |= {part: self._reasons.get(part, untried) for part in self._waiting}
            self._waiting.clear()

    def _release(self, worker: str, part: int) -> None:
        self._held[worker].remove(part)
        if not self._held[worker]:
            del self._held[worker]


def require_all(dataset: Dataset, ledger: Ledger, *, run_folder: Path) -> None:
    """Raise what went wrong, if anything did.

    Raises:
        DataError: the dataset's folder cannot be written.
        FuselineError: parts failed; the text lists them, with the reason and the log of each.
    """
    if ledger.unwritable is not None:
        raise DataError(
            f"{dataset.folder} cannot be written: {ledger.unwritable}. What was committed before is safe; make room, or give the "
            "folder back its permissions, and run the same command again."
        )
    if ledger.failed:
        raise parts_failed(dataset, ledger.failed, run_folder=run_folder)


def parts_failed(dataset: Dataset, failed: Mapping[int, str], *, run_folder: Path) -> FuselineError:
    """The error that lists parts by the reason they failed for."""
    by_reason: dict[str, list[int]] = {}
    for part, reason in sorted(failed.items()):
        by_reason.setdefault(reason, []).append(part)
    lines = "\n".join(f"  {_listed(parts)}: {reason}{_see(parts, run_folder=run_folder)}" for reason, parts in by_reason.items())
    count = f"{len(failed)} part{'s' * (len(failed) != 1)}"
    return FuselineError(
        f"{dataset.kind}/{dataset.name}: {count} failed, and the others are there.\n{lines}\n"
        "Run the same command again to make only what is missing."
    )


def _listed(parts: Sequence[int]) -> str:
    shown = ", ".join(map(str, parts[:10])) + (f" and {len(parts) - 10} more" if len(parts) > 10 else "")
    return f"part{'s' * (len(parts) != 1)} {shown}"


def _see(parts: Sequence[int], *, run_folder: Path) -> str:
    logs = [failure_log(run_folder, part) for part in parts if failure_log(run_folder, part).exists()]
    return f"\n    log: {logs[0]}" if logs else f"\n    logs: {run_folder / 'logs'}"
