"""Output to the terminal. Names, domains, texts and generated tokens are untrusted: they reach a terminal as text, not as commands.

All output of the command line goes through `say` or a `pipeline.rich_console.Console`. Files and pipes of csv, JSON and Parquet have the
stored data unchanged.
"""

import io
import sys
from typing import BinaryIO

import click

from ..store.shown import harmless


def say(text: str = "", *, err: bool = False, end: str = "\n") -> None:
    """Print a text to the standard output, or with `err` to the error stream."""
    click.echo(f"{harmless(text)}{end}", err=err, nl=False)


def binary_output() -> BinaryIO:
    """The standard output for UTF-8 bytes: unchanged to a file or pipe, made harmless for a terminal."""
    return _Terminal() if sys.stdout.isatty() else sys.stdout.buffer  # type: ignore[return-value]


class _Terminal(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        say(data.decode(errors="replace"), end="")
        return len(data)
