"""Rows of a corpus as they are read, whatever they come from: some columns, and where each row stands."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from ..store.errors import DataError

BATCH_ROWS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The columns that are wanted of a file."""

    required: Sequence[str]  # the file must have them
    optional: Sequence[str] = ()
    labels: Sequence[str] = ()  # of the required: read in their spelling

    @property
    def all(self) -> list[str]:
        """Each once."""
        return list(dict.fromkeys((*self.required, *self.optional)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Some consecutive rows of a file, or of a split of a hub's dataset."""

    where: str  # the file, or the dataset and its split
    unit: str  # what `numbers` counts: "line" from 1, "row" from 0; empty where the file is one document
    numbers: Sequence[int]
    columns: Mapping[str, Sequence[Any]]  # None where a row has no value

    @classmethod
    def of(cls, values: Mapping[str, Sequence[Any]], *, where: str, unit: str, numbers: Sequence[int], columns: Columns) -> Self:
        """Rows with the values of some columns; the optional ones that are not there have no value."""
        missing = {name: [None] * len(numbers) for name in columns.optional if name not in values}
        return cls(where=where, unit=unit, numbers=numbers, columns=dict(values) | missing)

    def __len__(self) -> int:
        return len(self.numbers)

    def place(self, index: int) -> str:
        """Where a row stands, for messages."""
        return f"{self.where}, {self.unit} {self.numbers[index]}" if self.unit else self.where

    def labels(self, column: str) -> list[str]:
        """A column's values in their spelling; empty where there is none.

        Raises:
            DataError: a value is no label, with its place.
        """
        return [self._label(index, column) for index in range(len(self))]

    def _label(self, index: int, column: str) -> str:
        value = self.columns[column][index]
        if value is None:
            return ""
        if isinstance(value, list | dict | bytes):
            raise DataError(f"{self.place(index)}: {column} must be a text or a number, and is of type {type(value).__name__}.")
        label = value.text if isinstance(value, Spelled) else str(value)
        if not _is_unicode(label):
            raise DataError(f"{self.place(index)}: {column} is not valid UTF-8. Convert the file to UTF-8, for example with iconv.")
        return label


@dataclass(frozen=True, slots=True)
class Spelled:
    """A value of JSON that is neither text nor null, as it is written there."""

    text: str

    @classmethod
    def of(cls, source: str, column: str) -> "Spelled | list[Any] | dict[str, Any]":
        """The value of a column in the source text of a row."""
        value = json.loads(source, parse_int=str, parse_float=str, parse_constant=str)[column]
        if isinstance(value, bool):
            return cls("true" if value else "false")
        return cls(value) if isinstance(value, str) else value


def require_columns(wanted: Sequence[str], *, names: Sequence[str], where: str) -> None:
    """Raise DataError unless each of these columns is there, and once."""
    for column in wanted:
        if column not in names:
            there = ", ".join(map(str, names))
            raise DataError(f"{where} has no column {column!r}; it has: {there}. Name the columns that it has in the recipe's [corpus].")
        if list(names).count(column) > 1:
            raise DataError(f"{where} has several columns named {column!r}. Rename all but one of them.")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
