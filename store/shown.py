"""Shows values from files in messages: as Python's `repr`, but short, and without control characters."""

import re
import reprlib
from collections.abc import Sequence

LONGEST_SHOWN = 200  # characters of a value in a message
LONGEST_MESSAGE = 1000  # characters of another library's message in ours
# Control characters except tab and line feed, separators that some programs read as line feeds, and marks that change the text direction.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


class _Short(reprlib.Repr):
    """Reads no more of a value than it shows: some values are small in memory but huge when written out."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxset, self.maxfrozenset, self.maxdict = 3, 8, 8, 8, 8, 8
        self.maxstring, self.maxother, self.maxlong = 80, 80, 80

    def repr_dict(self, x: dict[object, object], level: int) -> str:
        """In the order of the file; `reprlib` would sort."""
        if level <= 0 and x:
            return "{...}"
        pieces = [f"{self.repr1(key, level - 1)}: {self.repr1(x[key], level - 1)}" for key in list(x)[: self.maxdict]]
        return f"{{{', '.join(pieces + ['...'] * (len(x) > self.maxdict))}}}"

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write numbers with more than some thousand digits."""
        return f"a number of about {int(x.bit_length() * 0.30103) + 1:,} digits" if x.bit_length() > 1024 else super().repr_int(x, level)


_SHORT = _Short()


def shown(value: object) -> str:
    """A value for a message: its `repr`, shortened in the middle or at the end; only the first few nested values."""
    text = _SHORT.repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def written(value: object) -> str:
    """A value as written in a file: a short text without quotes, anything else as in `shown`."""
    return value if isinstance(value, str) and len(value) <= _SHORT.maxstring and value.isprintable() else shown(value)


def in_short(error: BaseException) -> str:
    """Another library's message about a file, shortened: it may quote the file at any length."""
    text = str(error).strip() or type(error).__name__
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}..."


def listed(values: Sequence[str], *, most: int, what: str = "", of: int | None = None) -> str:
    """The first values, separated by commas, and the number of the rest.

    Args:
        values: texts, each already short.
        most: how many to list.
        what: their name after the number of the rest, as in " files".
        of: their number, if `values` are only the first.
    """
    more = (len(values) if of is None else of) - most
    return ", ".join(values[:most]) + (f" and {more:,} more{what}" if more > 0 else "")


def harmless(text: str, *, one_line: bool = False) -> str:
    """A text without control characters: ESC becomes `\\x1b`; with `one_line` a line feed becomes `\\n`."""
    shown = _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
    return shown.replace("\n", "\\n") if one_line else shown
