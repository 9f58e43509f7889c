"""Commits parts while something goes wrong at one system call after the other, and checks after each what is there.

    python crashes.py FOLDER FAULT KIND

FAULT: `kill` (SIGKILL just before the n-th call, for every n until a commit gets through), `full` (the n-th call finds the disk full),
`same` and `other` (a second worker commits the same part, of the same or of other content, within the n-th call), `random` (SIGKILL at
random moments). KIND of payload: `arrays` or `table`. Prints how often the fault struck, and how often the part was there all the same (of
`other`: with the second's content).

It is one program that forks a child for each n, so that importing is paid for once; the parent never starts a thread.
"""

import errno
import itertools
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import zarr
from fuseline.store import durable
from fuseline.store.dataset import Dataset, PartContent
from fuseline.store.manifest import Manifest

CALLS = {"os.rename", "os.link", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "os.utime"}  # as `sys.addaudithook` names them
IDENTITY = {"stage": "test/1"}
SMALL = np.arange(1, 50, dtype=np.uint16)


def content(kind: str, value: int) -> PartContent:
    data = pl.DataFrame({"text": [f"text {value}", "y"] * 50}) if kind == "table" else {"ids_T": SMALL + value, "zeros_T": np.zeros(7)}
    return PartContent(data=data, counts={"documents": value}, attributes={"a": value})


def check(dataset: Dataset, part: int, *, kind: str, values: set[int]) -> Manifest:
    """The part is there, whole, and of one of these contents."""
    manifest = dataset.manifest(part)
    assert manifest.counts["documents"] in values, manifest
    expected = content(kind, manifest.counts["documents"]).data
    if isinstance(expected, pl.DataFrame):
        assert dataset.table(part).equals(expected)
    else:
        for name, array in zip(expected, dataset.read(part, *expected), strict=True):
            assert array.dtype == expected[name].dtype
            assert np.array_equal(array, expected[name]), name
    return manifest


def fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
    return pid


def outcome(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def strike(n: int, act: Callable[[], None], *, folder: Path, only: Callable[[str, tuple], bool] = lambda name, arguments: True) -> None:
    """Call `act` just before the n-th system call from now on that opens, writes, flushes or moves something in the folder."""
    seen = itertools.count(1)

    def call(name: str, arguments: tuple) -> None:
        if only(name, arguments) and next(seen) == n:
            act()

    def hook(name: str, arguments: tuple) -> None:
        if name in CALLS or (name == "open" and str(arguments[0]).startswith(str(folder))):
            call(name, arguments)

    def wrapped(name: str) -> Callable:
        function = getattr(os, name)

        def before(*arguments):
            call(name, arguments)
            return function(*arguments)

        return before

    for name in ("fsync", "write"):
        setattr(os, name, wrapped(name))
    sys.addaudithook(hook)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def takes_room(name: str, arguments: tuple) -> bool:
    writes = name == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
    return writes or name in {"write", "fsync", "os.mkdir", "os.rename", "os.link"}


def kills(dataset: Dataset, kind: str) -> tuple[int, int]:
    there = 0
    for n in itertools.count(1):

        def killed(n: int = n) -> None:
            strike(n, kill, folder=dataset.folder)
            dataset.commit(n, content=content(kind, n), seconds=0)

        def again(n: int = n) -> None:
            if n in dataset.parts():
                check(dataset, n, kind=kind, values={n})
            dataset.commit(n, content=content(kind, n), seconds=0)
            check(dataset, n, kind=kind, values={n})
            durable.sweep(dataset.folder)

        code = outcome(fork(killed))
        there += n in dataset.parts()
        assert outcome(fork(again)) == 0, n
        require_only(dataset, range(1, n + 1), kind=kind)
        if code == 0:
            return n - 1, there - 1
        assert code == -signal.SIGKILL, code
    raise AssertionError


def full_disks(dataset: Dataset, kind: str) -> tuple[int, int]:
    there = 0
    for n in itertools.count(1):

        def refused(n: int = n) -> None:
            met = False

            def disk_full() -> None:
                nonlocal met
                met = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            strike(n, disk_full, folder=dataset.folder, only=takes_room)
            told = False
            try:
                dataset.commit(n, content=content(kind, n), seconds=0)
            except OSError as error:
                told = error.errno == errno.ENOSPC
                if kind == "table":  # Zarr's own threads may go on writing for a moment
                    assert not list(dataset.folder.glob(f"{durable.TEMPORARY}*")), "it gives back the room that it took"
                dataset.commit(n, content=content(kind, n), seconds=0)
            check(dataset, n, kind=kind, values={n})
            os._exit(3 if told else 4 if met else 0)

        code = outcome(fork(refused))
        assert code in {0, 3, 4}, (n, code)
        durable.sweep(dataset.folder)
        require_only(dataset, range(1, n + 1), kind=kind)
        if code == 0:
            return n - 1, there
        there += code == 4  # a library tried again, and all was well
    raise AssertionError


def beside(dataset: Dataset, kind: str, *, values: tuple[int, int]) -> tuple[int, int]:
    """A second worker's whole commit happens within the n-th call of the first that touches what they share, the dataset's folder."""

    def shared(name: str, arguments: tuple) -> bool:
        return any(isinstance(argument, str | Path) and Path(argument).parent == dataset.folder for argument in arguments)

    other_first = 0
    for n in itertools.count(1):
        (asked, ask), (answered, answer) = os.pipe(), os.pipe()
        write = os.write

        ends = {"asked": asked, "ask": ask, "answered": answered, "answer": answer}

        def second(n: int = n, ends: dict = ends, write: Callable = write) -> None:
            os.close(ends["ask"])
            if os.read(ends["asked"], 1) == b"x":
                manifest = dataset.commit(n, content=content(kind, values[1]), seconds=0)
                assert manifest == check(dataset, n, kind=kind, values=set(values))
                write(ends["answer"], b"x")

        def first(n: int = n, ends: dict = ends, write: Callable = write) -> None:
            met = False
            os.close(ends["answer"])

            def meet() -> None:
                nonlocal met
                met = True
                write(ends["ask"], b"x")
                assert os.read(ends["answered"], 1) == b"x", "the second worker failed"

            strike(n, meet, folder=dataset.folder, only=shared)
            manifest = dataset.commit(n, content=content(kind, values[0]), seconds=0)
            assert manifest == check(dataset, n, kind=kind, values=set(values)), "what was acknowledged is what is there"
            os._exit(3 if met else 0)

        pids = [fork(second), fork(first)]
        for descriptor in ends.values():
            os.close(descriptor)
        codes = [outcome(pid) for pid in reversed(pids)]
        if codes == [0, 0]:
            return n - 1, other_first
        assert codes == [3, 0], n
        other_first += dataset.manifest(n).counts["documents"] == values[1]
        # Of equal payloads one is kept. Of different ones a second may stay: only `store gc` can know that nobody is about to name it.
        require_only(dataset, range(1, n + 1), kind=kind, payloads=1 if values[0] == values[1] else 2)
    raise AssertionError


def random_kills(dataset: Dataset, kind: str) -> tuple[int, int]:
    """A worker commits one part after the other until it is killed; what it acknowledged is there, what is there is whole."""
    generator, struck, most = random.Random(0), 0, {"arrays": 40, "table": 160}[kind]
    started = time.monotonic()
    assert outcome(fork(lambda: dataset.commit(0, content=content(kind, 0), seconds=0))) == 0
    seconds = time.monotonic() - started
    while struck < most:
        acknowledged, acknowledge = os.pipe()
        present = dataset.parts()

        def work(acknowledge: int = acknowledge, start: int = len(present)) -> None:
            for part in range(start, start + 1000):
                dataset.commit(part, content=content(kind, part), seconds=0)
                os.write(acknowledge, part.to_bytes(4))

        pid = fork(work)
        time.sleep(generator.random() * 1.5 * seconds)
        os.kill(pid, signal.SIGKILL)
        assert outcome(pid) == -signal.SIGKILL
        os.close(acknowledge)
        done = os.read(acknowledged, 1 << 16)
        os.close(acknowledged)
        found = dataset.parts()
        assert {int.from_bytes(done[i : i + 4]) for i in range(0, len(done), 4)} <= set(found)
        assert found == list(range(len(found)))
        durable.sweep(dataset.folder)
        struck += 1

    def check_all() -> None:
        for part in dataset.parts():
            check(dataset, part, kind=kind, values={part})

    assert outcome(fork(check_all)) == 0
    return struck, len(dataset.parts())


def require_only(dataset: Dataset, parts: range, *, kind: str, payloads: int = 1) -> None:
    """These parts are there with their payloads, the last with up to so many, and no more than that."""
    assert dataset.parts() == list(parts)
    suffix = {"arrays": "zarr", "table": "parquet"}[kind]
    last = parts[-1]
    names = sorted(path.name for path in dataset.folder.glob(f"part-{last:05d}.*"))
    expected = [f"part-{last:05d}.1.{suffix}", f"part-{last:05d}.json", f"part-{last:05d}.{suffix}"]
    assert names in ([expected, expected[1:]] if payloads > 1 else [expected[1:]]), names
    assert not list(dataset.folder.glob(f"{durable.TEMPORARY}*"))


def main() -> None:
    folder, fault, kind = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    zarr.config.set({"async.concurrency": 1})  # the order of the calls is then always the same
    dataset = Dataset.create(folder, identity=IDENTITY)
    faults = {
        "kill": kills,
        "full": full_disks,
        "same": lambda dataset, kind: beside(dataset, kind, values=(1, 1)),
        "other": lambda dataset, kind: beside(dataset, kind, values=(1, 2)),
        "random": random_kills,
    }
    print(json.dumps(faults[fault](dataset, kind)))


if __name__ == "__main__":
    main()
