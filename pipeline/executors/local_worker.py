"""`python -m fuseline.pipeline.executors.local_worker FD`: a worker process of the local executor.

The executor sends it parts through a socket.
"""

import os
import queue
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

from .work import Worker


def main(descriptor: int) -> None:
    """Answer each part with its outcomes, until the executor closes the socket."""
    os.set_inheritable(descriptor, False)
    connection: Connection[Any, Any] = Connection(descriptor)
    assignment, name = connection.recv()  # from `LocalCrew.hire`
    requests: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, requests), name="listen", daemon=True).start()
    with Worker(assignment, name=name) as worker:
        connection.send([])
        while True:
            connection.send(worker.step(requests.get()))


def _listen(connection: "Connection[Any, Any]", requests: "queue.SimpleQueue[int | None]") -> None:
    """Queue requests as they arrive. If the executor closes the socket, exit at once, even in the middle of a part."""
    while True:
        try:
            requests.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)  # safe, because a commit is atomic


if __name__ == "__main__":
    main(int(sys.argv[1]))
