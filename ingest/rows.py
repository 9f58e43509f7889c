"""Rows of a corpus, from any source: some columns, and the location of each row."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from ..store.errors import DataError

BATCH_ROWS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The columns to read from a file."""

    required: Sequence[str]  # the file must have them
    optional: Sequence[str] = ()
    labels: Sequence[str] = ()  # of the required columns: read as spelled in the file

    @property
    def all(self) -> list[str]:
        """Each once."""
        return list(dict.fromkeys((*self.required, *self.optional)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Some consecutive rows of a file, or of a split of a hub dataset."""

    where: str  # the file, or the dataset and its split
    unit: str  # what `numbers` counts: "line" from 1, "row" from 0; empty if the file is one document
    numbers: Sequence[int]
    columns: Mapping[str, Sequence[Any]]  # None if a row has no value

    @classmethod
    def of(cls, values: Mapping[str, Sequence[Any]], *, where: str, unit: str, numbers: Sequence[int], columns: Columns) -> Self:
        """Rows with the values of some columns; missing optional columns have no values."""
        missing = {name: [None] * len(numbers) for name in columns.optional if name not in values}
        return cls(where=where, unit=unit, numbers=numbers, columns=dict(values) | missing)

    def __len__(self) -> int:
        return len(self.numbers)

    def place(self, index: int) -> str:
        """The location of a row, for messages."""
        return f"{self.where}, {self.unit} {self.numbers[index]}" if self.unit else self.where

    def labels(self, column: str) -> list[str]:
        """A column's values as spelled in the file; empty if there is none.

        Raises:
            DataError: a value is not a label; the text gives its location.
        """
        return [self._label(index, column) for index in range(len(self))]

    def _label(self, index: int, column: str) -> str:
        value = self.columns[column][index]
        if value is None:
            return ""
        if isinstance(value, list | dict | bytes):
            raise DataError(f"{self.place(index)}: {column} must be a text or a number, but has type {type(value).__name__}.")
        label = value.text if isinstance(value, Spelled) else str(value)
        if not _is_unicode(label):
            raise DataError(f"{self.place(index)}: {column} is not valid UTF-8. Convert the file to UTF-8, for example with iconv.")
        return label


@dataclass(frozen=True, slots=True)
class Spelled:
    """A JSON value that is neither a string nor null, as spelled in the file."""

    text: str

    @classmethod
    def of(cls, source: str, column: str) -> "Spelled | list[Any] | dict[str, Any]":
        """The value of a column in the source text of a row."""
        value = json.loads(source, parse_int=str, parse_float=str, parse_constant=str)[column]
        if isinstance(value, bool):
            return cls("true" if value else "false")
        return cls(value) if isinstance(value, str) else value


def require_columns(wanted: Sequence[str], *, names: Sequence[str], where: str) -> None:
    """Raise DataError unless each of these columns exists exactly once."""
    for column in wanted:
        if column not in names:
            there = ", ".join(map(str, names))
            raise DataError(f"{where} has no column {column!r}; it has: {there}. Name existing columns in the recipe's [corpus].")
        if list(names).count(column) > 1:
            raise DataError(f"{where} has several columns named {column!r}. Rename all but one of them.")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
