"""The edge to the terminal. Names, domains, texts and generated tokens come from strangers: they reach a terminal as text, not as commands.

Everything that the command line shows goes through `say` or a `cluster.rich_console.Console`. Files and pipes of csv, JSON and Parquet hold
what is stored.
"""

import io
import sys
from typing import BinaryIO

import click

from ..store.shown import harmless


def say(text: str = "", *, err: bool = False, end: str = "\n") -> None:
    """Show a text on the standard output, or with `err` on the error stream."""
    click.echo(f"{harmless(text)}{end}", err=err, nl=False)


def binary_output() -> BinaryIO:
    """The standard output for bytes, which are UTF-8: as they are to a file or pipe, harmless to a terminal."""
    return _Terminal() if sys.stdout.isatty() else sys.stdout.buffer  # type: ignore[return-value]


class _Terminal(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        say(data.decode(errors="replace"), end="")
        return len(data)
