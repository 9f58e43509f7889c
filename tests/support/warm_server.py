"""The server of `warm.py`: imports everything once, and forks a process for each request. One thread, so that forking is safe."""

import contextlib
import ctypes
import gc
import json
import os
import selectors
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import NoReturn

_PR_SET_PDEATHSIG = 1


def serve(path: str, *, owner: int) -> None:
    """Fork until the owner ends."""
    _import_everything()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(64)
    os.rename(f"{path}.new", path)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(os.pidfd_open(owner), selectors.EVENT_READ, "owner")
    children: dict[int, tuple[int, socket.socket]] = {}  # by descriptor of the process
    while True:
        for key, _ in selector.select():
            if key.data == "owner":
                return
            if key.fileobj is listener:
                connection, _ = listener.accept()
                try:
                    pid = _forked(connection, close=[listener.fileno(), *children])
                except (OSError, ValueError):  # its launcher was killed in the middle of its request
                    connection.close()
                    continue
                descriptor = os.pidfd_open(pid)
                children[descriptor] = (pid, connection)
                selector.register(descriptor, selectors.EVENT_READ)
                with contextlib.suppress(OSError):
                    connection.sendall(pid.to_bytes(8, "big"))
                continue
            pid, connection = children.pop(key.fd)
            selector.unregister(key.fd)
            os.close(key.fd)
            _, status = os.waitpid(pid, 0)
            with contextlib.suppress(OSError):  # its launcher may be gone
                connection.sendall(status.to_bytes(8, "big"))
            connection.close()


def _import_everything() -> None:
    import warnings

    import transformers

    with warnings.catch_warnings(action="ignore"):
        import torch.utils.tensorboard  # noqa: F401

        transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM, transformers.PreTrainedTokenizerFast  # noqa: B018
    assert threading.active_count() == 1
    gc.freeze()


def _forked(connection: socket.socket, *, close: list[int]) -> int:
    header, descriptors, _, _ = socket.recv_fds(connection, 8, 16)
    header += _received(connection, 8 - len(header))
    request = json.loads(_received(connection, int.from_bytes(header, "big")))
    pid = os.fork()
    if not pid:
        _become(request, descriptors, close=[*close, connection.fileno()])
    for descriptor in descriptors:
        os.close(descriptor)
    return pid


def _received(connection: socket.socket, n: int) -> bytes:
    data = b""
    while len(data) < n:
        more = connection.recv(n - len(data))
        if not more:
            raise ValueError("the request ends too soon")
        data += more
    return data


def _become(request: dict, descriptors: list[int], *, close: list[int]) -> NoReturn:
    """In the forked process."""
    try:
        for descriptor in close:
            os.close(descriptor)
        code = _run(request, descriptors)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End as the interpreter does: threads are waited for, and what is buffered is written."""
    import atexit

    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 120
    os._exit(code)


def _run(request: dict, descriptors: list[int]) -> int:
    """Become the process that was asked for."""
    if request["new_session"]:
        os.setsid()
    for number, descriptor in enumerate(descriptors[:3]):
        os.dup2(descriptor, number)
    for descriptor, number in zip(descriptors[3:], request["passed"], strict=True):
        if descriptor != number:
            os.dup2(descriptor, number)
        os.set_inheritable(number, False)
    for descriptor in set(descriptors) - {0, 1, 2, *request["passed"]}:
        os.close(descriptor)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = [request["module"], *request["argv"][request["argv"].index("-m") + 2 :]]
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    sys.stdin = open(0, encoding=encoding, closefd=False)  # noqa: SIM115  # for as long as the process lives
    sys.stdout = open(1, "w", encoding=encoding, closefd=False, buffering=1)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding=encoding, errors="backslashreplace", closefd=False, buffering=1)  # noqa: SIM115
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    match request["module"]:
        case "fuseline.train":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as its launcher does before it starts
            _die_with(request["launcher"])
            from fuseline.train import rank

            rank.die_with_parent = lambda: None  # its parent is the server
            return rank.main(Path(sys.argv[1]))
        case "fuseline.pipeline.executors.local_worker":
            from fuseline.pipeline.executors.local_worker import main

            main(int(sys.argv[1]))
            return 0
        case _:
            from fuseline.cli import main as command_line

            return command_line(prog_name="fuseline")


def _die_with(launcher: int) -> None:
    """End this process when its launcher does, as PR_SET_PDEATHSIG would."""
    try:
        descriptor = os.pidfd_open(launcher)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
        return

    def watch() -> None:
        selector = selectors.DefaultSelector()
        selector.register(descriptor, selectors.EVENT_READ)
        selector.select()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


if __name__ == "__main__":
    serve(sys.argv[1], owner=int(os.environ["FUSELINE_WARM_OWNER"]))
