"""The ranks of a training on this machine: started together, ended together, and not reachable from outside.

`torchrun` listens on every interface of the machine, and its agents unpickle data from the store behind that port, so anyone who can reach
it can run code. Ranks that are started here use a file in a private folder as rendezvous, and exchange messages over the loopback
interface. Only trainings on several machines need `torchrun`; docs/security.md says what they expose.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import psutil

from ..store.errors import FuselineError
from .meeting import MEETING
from .rank import die_with_parent

_GRACE_SECONDS = 30.0  # from the failure of one rank until the others are killed


class Ranks:
    """Processes that run the same command, each with its rank in the environment, as with `torchrun`.

    Leaving the `with` block kills processes that still run.
    """

    def __init__(self, command: Sequence[str], *, n: int, environment: Mapping[str, str], logs: Path) -> None:
        """Start `n` processes; rank r prints to `rank-<r>.log` in the folder `logs`.

        Raises:
            FuselineError: this machine has no loopback interface.
        """
        loopback = _loopback()
        self.first_failed: int | None = None
        self._is_asked_to_stop, self._deadline = False, 0.0
        self._private = Path(tempfile.mkdtemp(prefix="fuseline-ranks-"))  # mode 0700
        common = os.environ | environment | loopback | {MEETING: str(self._private / "store")}
        self._logs = [logs / f"rank-{rank}.log" for rank in range(n)]
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank, log in enumerate(self._logs):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
                with log.open("wb") as output:  # a file, because a child that outlives its rank would keep a pipe open
                    self._processes.append(
                        subprocess.Popen(
                            command,
                            env=common | place,
                            stdin=subprocess.DEVNULL,
                            stdout=output,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,  # a Ctrl-C reaches them only through `ask_to_stop`
                            preexec_fn=_begin,
                        )
                    )
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        shutil.rmtree(self._private, ignore_errors=True)

    @property
    def logs(self) -> list[Path]:
        """The log of each rank, starting with that of the rank that failed first."""
        return sorted(self._logs, key=lambda log: self.first_failed is None or log != self._logs[self.first_failed])

    def are_running(self) -> bool:
        """Whether any rank is running. After one fails, the others are asked to stop, and killed if they do not."""
        codes = [process.poll() for process in self._processes]
        if self.first_failed is None and any(codes):
            self.first_failed = next(rank for rank, code in enumerate(codes) if code)
            self._deadline = time.monotonic() + _GRACE_SECONDS
            if not self._is_asked_to_stop:
                self._signal(signal.SIGTERM)
        elif self.first_failed is not None and not self._is_asked_to_stop and time.monotonic() > self._deadline:
            self._signal(signal.SIGKILL)
        return None in codes

    def ask_to_stop(self) -> None:
        """Ask for a last checkpoint, without a time limit."""
        self._is_asked_to_stop = True
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)


def _begin() -> None:
    """Runs in a rank before Python starts: the rank ends with its launcher, and ignores SIGUSR1 until the trainer handles it."""
    die_with_parent()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _loopback() -> dict[str, str]:
    """Environment variables that make gloo and NCCL listen only on the loopback interface, even against a cluster's profile.

    Raises:
        FuselineError: there is none.
    """
    names = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(each.family == socket.AF_INET and each.address.startswith("127.") for each in addresses)
    ]
    if not names:
        raise FuselineError(
            "The ranks need a loopback interface (127.0.0.1), but this machine has none. Start one with: ip link set lo up."
        )
    return {"GLOO_SOCKET_IFNAME": names[0], "NCCL_SOCKET_IFNAME": f"={names[0]}"}
