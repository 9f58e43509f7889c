"""Rows of csv files, read with Python's `csv`: a field is exactly its characters, and only an empty field is missing.

The readers of pandas, polars and pyarrow guess types, and read "NA", "null" or "None" as missing.
"""

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

from ..store.errors import DataError
from .files import CorpusFile
from .opened_file import LARGEST_TEXT
from .rows import BATCH_ROWS, Columns, Rows, require_columns


@contextmanager
def _csv_reader(data: io.BufferedReader) -> Iterator[Any]:
    csv.field_size_limit(LARGEST_TEXT)  # a document is a field
    # Invalid UTF-8 is only an error in the columns that are read.
    with io.TextIOWrapper(data, encoding="utf-8", errors="surrogateescape", newline="") as text:
        yield csv.reader(text, strict=True)


def csv_names(data: io.BufferedReader, *, file: CorpusFile) -> list[str]:
    """The columns of a file; none for an empty file."""
    with _csv_reader(data) as reader:
        return _header(reader, file=file)


def _header(reader: Any, *, file: CorpusFile) -> list[str]:
    return next((fields for fields in _csv_records(reader, file=file)), _Record(0, [])).fields


class _Record(NamedTuple):
    line: int  # on which it begins
    fields: list[str]


def _csv_records(reader: Any, *, file: CorpusFile, n_fields: int | None = None) -> Iterator[_Record]:
    """The records of a file, all with `n_fields` fields; empty lines are skipped."""
    line = reader.line_num + 1
    try:
        for fields in reader:
            if fields and n_fields is not None and len(fields) != n_fields:
                problem = f"{file.where}, line {line}: has {len(fields)} field{'s' * (len(fields) != 1)}, but the header has {n_fields}."
                raise DataError(f"{problem} Put texts with commas or line ends in quotes.")
            if fields:
                yield _Record(line, fields)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{file.where}, line {line}: is not valid csv ({error}). Put fields with quotes, commas or line ends in quotes, and double "
            "the quotes inside."
        ) from error


def csv_batches(data: io.BufferedReader, file: CorpusFile, columns: Columns) -> Iterator[Rows]:
    """The rows of a file, numbered by the line on which each begins, from 1."""
    with _csv_reader(data) as reader:
        header = _header(reader, file=file)
        if not header:
            return
        _require_commas(header, file=file)
        require_columns(columns.required, names=header, where=file.where)
        places = {name: header.index(name) for name in columns.all if name in header}
        records = _csv_records(reader, file=file, n_fields=len(header))
        while batch := list(islice(records, BATCH_ROWS)):
            values = {name: [record.fields[place] or None for record in batch] for name, place in places.items()}
            yield Rows.of(values, where=file.where, unit="line", numbers=[record.line for record in batch], columns=columns)


def _require_commas(header: list[str], *, file: CorpusFile) -> None:
    if len(header) == 1 and (other := next((mark for mark in ";\t|" if mark in header[0]), None)):
        problem = f"{file.where} has one column, {header[0]!r}: its fields seem to be separated by {other!r}."
        raise DataError(f"{problem} Separate them by commas.")
