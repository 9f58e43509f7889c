"""The edge to the terminal. Names, domains, texts and generated tokens come from strangers: they reach a terminal as text, not as commands.

Everything that the command line shows goes through `say` or a `rich_console.Console`. Files and pipes of csv, JSON and Parquet hold what is
stored.
"""

import io
import re
import sys
from typing import BinaryIO

import click

# Control characters but tab and line feed, separators that some programs take for line feeds, and marks that turn the direction of writing.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def harmless(text: str, *, one_line: bool = False) -> str:
    """A text without control characters: ESC is written `\\x1b`; with `one_line` a line feed is written `\\n`."""
    shown = _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
    return shown.replace("\n", "\\n") if one_line else shown


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
