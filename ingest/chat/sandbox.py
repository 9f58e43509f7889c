"""Runs chat templates, which are untrusted programs, in a separate process (`template_process`) with limits.

One such process serves all templates of this process, and ends with it. Conversations are sent in batches, so that it renders while this
process handles the answers.
"""

import atexit
import json
import os
import selectors
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...store.errors import DataError
from .template_process import MEMORY, read_frame, write_frame

TEMPLATE_SECONDS = 60  # for one conversation, which usually takes a millisecond or less
TEMPLATE_BYTES = 4 << 30  # of memory
TEMPLATE_TEXT = 64 << 20  # bytes of JSON that it may write for one conversation, plus a share in proportion to it
TEMPLATE_TEXTS = 1 << 30  # the same for all conversations of a call
TEMPLATE_FACTOR = 16  # times the size of the messages
_GRACE_SECONDS = 2  # after which the process ends itself if this one has ended
_JSON_BYTES = 12  # of a character at most
_TIME, _MEMORY = f"{TEMPLATE_SECONDS} seconds", f"{TEMPLATE_BYTES >> 30} GiB of memory"
_TEXT = f"{TEMPLATE_TEXT >> 20} MiB of text (and {TEMPLATE_FACTOR} times the length of its messages)"
_BATCH = 64  # conversations in a request
_BATCH_CHARACTERS = 4 << 20

Messages = Sequence[Mapping[str, str]]


class EndlessTemplate(DataError):
    """A template exceeded a limit of time, memory or text for a conversation; `index` is the conversation's."""

    def __init__(self, index: int, *, limit: str, of: str = "") -> None:
        problem = f"The chat template{of} needs more than {limit} for one conversation."
        super().__init__(problem, remedy="Fix the chat template, or use another one.")
        self.index, self.limit = index, limit


class Sandbox:
    """The rendering process, started when it is first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # after a fork, the pipes lead to the parent's process
        self._lock = threading.Lock()

    def render(
        self, program: str, *, variables: Mapping[str, Any], conversations: Sequence[Messages], prompt: bool
    ) -> list[dict[str, str]]:
        """The template's output for each conversation: `{"text": …}`, or `{"refused": its message}`.

        Raises:
            EndlessTemplate: it needs too much time or memory, or writes too much.
        """
        most = TEMPLATE_TEXTS + _in_proportion(*conversations)
        answers: list[dict[str, str]] = []
        with self._lock:
            for batch in _batches(conversations):
                request = {"program": program, "variables": dict(variables), "conversations": batch, "prompt": prompt}
                try:
                    self._send(json.dumps(request).encode(), index=len(answers))
                    for conversation in batch:
                        data = self._answer(len(answers), most=min(most, TEMPLATE_TEXT + _in_proportion(conversation)))
                        answers.append(json.loads(data))
                        most -= len(data)
                except BaseException:  # also on Ctrl-C: answers still to come would be read as those of the next request
                    self.close()
                    raise
        return answers

    def _send(self, data: bytes, *, index: int) -> None:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is not None:
            self.close()  # the system killed it while it was idle
        if self._process is None or self._owner != os.getpid():
            self._process, self._owner = _started(), os.getpid()
        assert self._process.stdin is not None
        try:
            write_frame(self._process.stdin, data)
        except BrokenPipeError as error:
            raise EndlessTemplate(index, limit=_MEMORY) from error

    def _answer(self, index: int, *, most: int) -> bytes:
        """The next answer, of at most so many bytes."""
        assert self._process is not None
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            is_there = bool(selector.select(TEMPLATE_SECONDS))
        try:
            data = read_frame(self._process.stdout, most=most) if is_there else b""
        except OverflowError as error:
            raise EndlessTemplate(index, limit=_TEXT) from error
        if not data:
            # Its alarm, its memory limit, or the system ended it.
            raise EndlessTemplate(index, limit=_MEMORY if is_there else _TIME)
        if data == MEMORY:
            raise EndlessTemplate(index, limit=_MEMORY)
        return data

    def close(self) -> None:
        """End the process; a new one is started when it is needed."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        for stream in (process.stdin, process.stdout):
            with suppress(OSError):
                if stream is not None:
                    stream.close()
        process.wait()


def _started() -> subprocess.Popen[bytes]:
    program = Path(__file__).with_name("template_process.py")
    limits = [str(TEMPLATE_SECONDS + _GRACE_SECONDS), str(TEMPLATE_BYTES)]
    # -P: the folder of the program is not searched for modules.
    return subprocess.Popen(
        [sys.executable, "-P", str(program), *limits], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    )


def _in_proportion(*conversations: Messages) -> int:
    """Bytes of answers that are allowed for the messages."""
    n_characters = sum(len(message["content"]) for conversation in conversations for message in conversation)
    return TEMPLATE_FACTOR * _JSON_BYTES * n_characters


def _batches(conversations: Sequence[Messages]) -> Iterator[list[Messages]]:
    batch: list[Messages] = []
    n_characters = 0
    for conversation in conversations:
        batch.append(conversation)
        n_characters += sum(len(message["content"]) for message in conversation)
        if len(batch) == _BATCH or n_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


SANDBOX = Sandbox()
atexit.register(SANDBOX.close)
