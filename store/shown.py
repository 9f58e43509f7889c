"""How values from files are shown in messages: as Python writes them, but short; and texts without control characters."""

import re
import reprlib
from collections.abc import Sequence

LONGEST_SHOWN = 200  # characters of a value in a message
LONGEST_MESSAGE = 1000  # characters of another library's message in ours
# Control characters but tab and line feed, separators that some programs take for line feeds, and marks that turn the direction of writing.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


class _Short(reprlib.Repr):
    """Looks at no more of a value than it shows: some values are small in memory and endless when they are written out."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxset, self.maxfrozenset, self.maxdict = 3, 8, 8, 8, 8, 8
        self.maxstring, self.maxother, self.maxlong = 80, 80, 80

    def repr_dict(self, x: dict[object, object], level: int) -> str:
        """In the order of the file; the original sorts."""
        if level <= 0 and x:
            return "{...}"
        pieces = [f"{self.repr1(key, level - 1)}: {self.repr1(x[key], level - 1)}" for key in list(x)[: self.maxdict]]
        return f"{{{', '.join(pieces + ['...'] * (len(x) > self.maxdict))}}}"

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write numbers of more than some thousand digits."""
        return f"a number of about {int(x.bit_length() * 0.30103) + 1:,} digits" if x.bit_length() > 1024 else super().repr_int(x, level)


_SHORT = _Short()


def shown(value: object) -> str:
    """A value as a message shows it: its `repr`, shortened in the middle or at the end; of nested values the first few."""
    text = _SHORT.repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def written(value: object) -> str:
    """A value as it stands in a file: a short text without quotes, anything else as of `shown`."""
    return value if isinstance(value, str) and len(value) <= _SHORT.maxstring and value.isprintable() else shown(value)


def in_short(error: BaseException) -> str:
    """What another library says of a file: its message may quote the file, whatever length that has."""
    text = str(error).strip() or type(error).__name__
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}..."


def listed(values: Sequence[str], *, most: int, what: str = "", of: int | None = None) -> str:
    """The first values, with commas between them, and how many more there are.

    Args:
        values: texts, each short already.
        most: how many to list.
        what: names them after the number of those left out, as in " files".
        of: how many there are, where `values` are only the first.
    """
    more = (len(values) if of is None else of) - most
    return ", ".join(values[:most]) + (f" and {more:,} more{what}" if more > 0 else "")


def harmless(text: str, *, one_line: bool = False) -> str:
    """A text without control characters: ESC is written `\\x1b`; with `one_line` a line feed is written `\\n`."""
    shown = _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
    return shown.replace("\n", "\\n") if one_line else shown
