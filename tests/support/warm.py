"""Processes that are forked from a warm server instead of being started: ranks, workers and the command line have torch imported already.

Importing torch, Megatron-core and transformers takes 5 to 7 processor seconds, and the tests start several hundred processes that need
them. Each is still a process of its own, with its own session, files, environment and signals, and can be killed; only what Python has
imported is inherited. `FUSELINE_COLD=1` in the environment starts processes as usual.

`install` replaces `subprocess.Popen` by a class that asks the server where the command is one of these, and is the usual one otherwise:

    python -P -m fuseline.train RUN_FOLDER
    python -P -m fuseline.pipeline.executors.local_worker FD
    python -m fuseline ...
"""

import contextlib
import fcntl
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SOCKET = "FUSELINE_WARM_SOCKET"  # where the server listens; without it nothing is warm
OWNER = "FUSELINE_WARM_OWNER"  # process with which the server ends
COLD = "FUSELINE_COLD"
AS_IMPORTED = "FUSELINE_WARM_ENVIRONMENT"
MODULES = {"fuseline", "fuseline.train", "fuseline.pipeline.executors.local_worker"}
AT_IMPORT = ("OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "HF_HOME", "HF_HUB_OFFLINE", "FUSELINE_FOLLOW_LINKS", "HOME")
_START_SECONDS = 120.0


def module_of(command: object, environment: dict[str, str]) -> str | None:
    """The module that a command runs, if the server can."""
    if not isinstance(command, list | tuple) or not command or str(command[0]) != sys.executable or environment.get(COLD):
        return None
    rest = [str(each) for each in command[1:]]
    rest = rest[1:] if rest[:1] == ["-P"] else rest
    if rest[:1] != ["-m"] or rest[1] not in MODULES or SOCKET not in environment:
        return None
    is_same = json.loads(environment[AS_IMPORTED]) == as_imported(environment)
    return rest[1] if is_same else None


def as_imported(environment: Mapping[str, str]) -> dict[str, str | None]:
    """The variables that packages read when they are imported: a process with others is started as usual."""
    return {name: environment.get(name) for name in AT_IMPORT}


def offer(folder: Path) -> None:
    """Let this process and those that it starts use a server, which is started when the first one needs it."""
    os.environ |= {SOCKET: str(folder / "warm"), OWNER: str(os.getpid()), AS_IMPORTED: json.dumps(as_imported(os.environ))}
    paths = [str(Path(__file__).with_name("site")), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    install()


class Popen(subprocess.Popen):
    """`subprocess.Popen`, but for what is forked from the server."""

    _warm: socket.socket | None = None
    _status: int | None = None

    def _execute_child(  # all arguments are positional
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask, start_new_session, process_group,
    ) -> None:  # fmt: skip
        environment = {os.fsdecode(key): os.fsdecode(value) for key, value in (os.environ if env is None else env).items()}
        module = module_of(args, environment)
        if module is None or shell or process_group not in (-1, None) or uid is not None:
            super()._execute_child(
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
                p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask, start_new_session,
                process_group,
            )  # fmt: skip
            return
        request = {
            "argv": [os.fsdecode(each) for each in args],
            "module": module,
            "environment": environment,
            "folder": os.fsdecode(cwd if cwd is not None else os.getcwd()),
            "new_session": bool(start_new_session),
            "launcher": os.getpid(),
            "passed": list(pass_fds),
        }
        streams = [number if given == -1 else given for number, given in enumerate((p2cread, c2pwrite, errwrite))]
        body = json.dumps(request).encode()
        self._warm = _connected()
        socket.send_fds(self._warm, [len(body).to_bytes(8, "big")], [*streams, *pass_fds])
        self._warm.sendall(body)
        self.pid = int.from_bytes(_read(self._warm, 8), "big")
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _take_status(self, *, block: bool) -> bool:
        """Whether the process has ended."""
        assert self._warm is not None
        if self._status is None and (block or select.select([self._warm], [], [], 0)[0]):
            data = _read(self._warm, 8)
            self._status = int.from_bytes(data, "big") if data else 256  # the server is gone
            self._warm.close()
        return self._status is not None

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._warm is None:
            return super()._try_wait(wait_flags)
        if self._take_status(block=not wait_flags & os.WNOHANG):
            return self.pid, self._status or 0
        return 0, 0

    def _internal_poll(self, *arguments: Any, **more: Any) -> int | None:
        if self._warm is None:
            return super()._internal_poll(*arguments, **more)
        if self.returncode is None and self._take_status(block=False):
            self._handle_exitstatus(self._status)
        return self.returncode


def _read(connection: socket.socket, n: int) -> bytes:
    data = b""
    while len(data) < n:
        more = connection.recv(n - len(data))
        if not more:
            return b""
        data += more
    return data


def _connected() -> socket.socket:
    """A connection to the server, which is started if need be."""
    path = os.environ[SOCKET]
    with contextlib.suppress(OSError):
        return _connect(path)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):
            return _connect(path)
        _start(path)
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                return _connect(path)
            time.sleep(0.05)
    raise RuntimeError("the warm server does not answer")


def _connect(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection


def _start(path: str) -> None:
    with open(f"{path}.log", "ab") as log:
        server = _Usual(
            [sys.executable, str(Path(__file__).with_name("warm_server.py")), path],
            env=os.environ | {COLD: "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    server.returncode = 0  # nobody waits for it: it ends with its owner


_Usual = subprocess.Popen
Popen.__module__, Popen.__qualname__ = _Usual.__module__, _Usual.__qualname__  # for who looks it up by name


def install() -> None:
    """Use the server in this process, if there is to be one."""
    if os.environ.get(SOCKET) and subprocess.Popen is _Usual:
        subprocess.Popen = Popen  # type: ignore[misc]
