"""The journal that each worker keeps in its run's folder. With it, any process that sees the workspace can follow the worker.

    runs/<run>/workers/<worker>.jsonl       a line when the worker starts, begins, commits or fails a part, or ends
    runs/<run>/failures/part-00042.log      of a part that failed: the traceback of each attempt
    runs/<run>/logs/                        what the workers print

A journal has one writer, so it needs no lock. The writer touches the file every few seconds: if a journal has not ended and was not
touched for a minute, its worker has died.
"""

import contextlib
import json
import os
import platform
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from .errors import FuselineError
from .json_files import decode_json, is_number, read_lines

BEAT_SECONDS = 5.0
DEAD_SECONDS = 60.0
_FOLDERS = ("workers", "failures", "logs")
_NEEDED: dict[str, dict[str, type]] = {  # the fields of each event
    "started": {"host": str, "pid": int},
    "begun": {"part": int},
    "committed": {"part": int},
    "failed": {"part": int, "reason": str},
}


def prepare(run_folder: Path) -> None:
    """Make the folders for workers. Workers make none, so that a machine that does not see the workspace cannot begin a second one."""
    for name in _FOLDERS:
        (run_folder / name).mkdir(exist_ok=True)


def failure_log(run_folder: Path, part: int) -> Path:
    """The file with the tracebacks of a part's attempts."""
    return run_folder / "failures" / f"part-{part:05d}.log"


def reason_of(error: BaseException) -> str:
    """An error in one line: a user's mistake as its text, any other error with its type."""
    text = str(error) if isinstance(error, FuselineError) else f"{type(error).__name__}: {error}"
    return next(iter(text.splitlines()), "")


class Journal:
    """Writes one worker's journal. While it is open, it shows that the worker is alive."""

    def __init__(self, run_folder: Path, *, worker: str) -> None:
        """Begin or continue a journal; `prepare` must have made its folder.

        Raises:
            FileNotFoundError: this machine does not see the run's folder.
        """
        self.run_folder, self._path, self._closed = run_folder, _journal_path(run_folder, worker), threading.Event()
        if not self._path.parent.is_dir():
            raise FileNotFoundError(f"{platform.node()} does not see {self._path.parent}. Put the workspace on shared storage.")
        self._write("started", host=platform.node(), pid=os.getpid())
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._write("ended")

    def begun(self, part: int) -> None:
        """Record that the worker computes a part."""
        self._write("begun", part=part)

    def committed(self, part: int) -> None:
        """Record that the part's manifest exists."""
        self._write("committed", part=part)

    def failed(self, part: int, error: BaseException) -> None:
        """Record a failed attempt: the traceback goes into the part's log; of a user's mistake only the text."""
        is_mistake = isinstance(error, FuselineError)
        text = f"{error}\n" if is_mistake else "".join(traceback.format_exception(error))
        heading = f"---- {time.strftime('%Y-%m-%d %H:%M:%S')} {platform.node()} {self._path.stem}\n"
        with contextlib.suppress(OSError), failure_log(self.run_folder, part).open("a", encoding="utf-8") as log:
            log.write(heading + text)
        self._write("failed", part=part, reason=reason_of(error))

    def _write(self, event: str, **details: Any) -> None:
        with contextlib.suppress(OSError):  # on a full disk, the commit fails and reports it
            _append(self._path, event, **details)

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._path)


def end_of(run_folder: Path, *, worker: str) -> None:
    """End the journal of a worker that is known to be dead."""
    if _journal_path(run_folder, worker).exists():
        _append(_journal_path(run_folder, worker), "ended")


@dataclass(slots=True, kw_only=True)
class WorkerState:
    """The state of a worker, read from its journal."""

    worker: str
    refreshed_at: float  # seconds since the epoch, like all times
    host: str = ""
    pid: int = 0
    started_at: float = 0.0
    ended: bool = False
    begun: Counter[int] = field(default_factory=Counter)  # part -> how often it was begun
    unfinished: list[int] = field(default_factory=list)  # parts that are computed or written now, or were when the worker died
    interrupted: Counter[int] = field(default_factory=Counter)  # part -> how often the worker died or was requeued during it
    failed: dict[int, str] = field(default_factory=dict)  # part -> why its last attempt failed

    @property
    def is_alive(self) -> bool:
        """Whether the worker has not ended and its journal was touched within a minute."""
        return not self.ended and time.time() - self.refreshed_at < DEAD_SECONDS

    def add(self, record: dict[str, Any]) -> None:
        """Update the state with one line."""
        part = record.get("part", -1)
        match record["event"]:
            case "started":
                self.host, self.pid, self.started_at, self.ended = record["host"], record["pid"], record["at"], False
                self._let_go()
            case "begun":
                self.begun[part] += 1
                self.unfinished.append(part)
                self.failed.pop(part, None)
            case "committed" | "failed":
                self.unfinished = [other for other in self.unfinished if other != part]
                if record["event"] == "failed":
                    self.failed[part] = record["reason"]
            case "ended":
                self.ended = True
                self._let_go()

    def _let_go(self) -> None:
        self.interrupted.update(self.unfinished)
        self.unfinished = []


def read_journals(run_folder: Path) -> Iterator[WorkerState]:
    """The state of every worker of a run, by name. A last line that a crash cut short is left out."""
    for path in sorted((run_folder / "workers").glob("*.jsonl")):
        state = WorkerState(worker=path.stem, refreshed_at=path.lstat().st_mtime)
        with contextlib.suppress(OSError, ValueError):  # not a journal: the rest cannot be read
            for line in read_lines(path):
                with contextlib.suppress(ValueError):  # the line after one that was cut short continues it
                    state.add(_checked(decode_json(line)))
        yield state


def _checked(record: Any) -> dict[str, Any]:
    """A line of a journal, checked to be one that `Journal` writes.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(record, dict) or not isinstance(record.get("event"), str) or not is_number(record.get("at")):
        raise ValueError("it must hold an object with event and at")
    needed = _NEEDED.get(record["event"], {})
    if any(type(record.get(name)) is not kind for name, kind in needed.items()):
        raise ValueError(f"the fields of the event {record['event']} are not those that a worker writes")
    return record


def _journal_path(run_folder: Path, worker: str) -> Path:
    return run_folder / "workers" / f"{worker}.jsonl"


def _append(path: Path, event: str, **details: Any) -> None:
    line = json.dumps({"event": event, "at": time.time(), **details}, ensure_ascii=False)
    with path.open("ab", buffering=0) as file:
        file.write(f"{line}\n".encode())
