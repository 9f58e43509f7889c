"""Rows of JSON files: objects on separate lines, in one array, or one after another.

A number that is a label keeps its spelling, and a string that looks like a date stays a string; readers that guess types change both.
"""

import io
import json
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, NamedTuple

from ..store.errors import DataError
from ..store.json_text import parse_json, reason_of, require_shallow
from .files import CorpusFile
from .opened_file import bounded_lines, decoded
from .rows import BATCH_ROWS, Columns, Rows, Spelled, require_columns


def json_names(data: io.BufferedReader, *, file: CorpusFile) -> list[str]:
    """The columns of a file's first rows."""
    return list(dict.fromkeys(name for row in islice(_json_rows(data, file=file), BATCH_ROWS) for name in row.fields))


class _JsonRow(NamedTuple):
    line: int
    source: str
    fields: dict[str, Any]


def json_batches(data: io.BufferedReader, file: CorpusFile, columns: Columns) -> Iterator[Rows]:
    """The rows of a file, numbered by the line on which each begins, from 1.

    A row may omit a column without a value, but not all of the first thousand rows may.
    """
    rows, is_first = _json_rows(data, file=file), True
    while batch := list(islice(rows, BATCH_ROWS)):
        if is_first:
            names = dict.fromkeys(name for row in batch for name in row.fields)
            require_columns(columns.required, names=list(names), where=file.where)
        is_first = False
        values = {name: [_json_value(row, name, is_label=name in columns.labels) for row in batch] for name in columns.all}
        yield Rows.of(values, where=file.where, unit="line", numbers=[row.line for row in batch], columns=columns)


def _json_value(row: _JsonRow, name: str, *, is_label: bool) -> Any:
    value = row.fields.get(name)
    return Spelled.of(row.source, name) if is_label and isinstance(value, bool | int | float) else value


def _json_rows(data: io.BufferedReader, *, file: CorpusFile) -> Iterator[_JsonRow]:
    """Objects on separate lines, in one array, or one after another."""
    lines = bounded_lines(data, file=file)
    number, first = next(((number, line) for number, line in enumerate(lines, start=1) if line.strip()), (1, b""))
    if first.lstrip()[:1] == b"[" or (first and not _is_json(first)):
        yield from _json_values(decoded(first + data.read(), file=file, line=number), file=file, line=number)
        return
    for line, content in enumerate(chain([first], lines), start=number):
        if content.strip():
            yield _json_row(decoded(content, file=file, line=line), file=file, line=line)


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line)
    except ValueError:
        return False
    return True


def _json_values(text: str, *, file: CorpusFile, line: int) -> Iterator[_JsonRow]:
    """The objects of an array, or objects that follow each other over several lines."""
    decoder, counted = json.JSONDecoder(), 0
    in_array = text.lstrip().startswith("[")
    place = _after_space(text, text.index("[") + 1) if in_array else _after_space(text, 0)
    while place < len(text) and not (in_array and text[place] == "]"):
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, end = decoder.raw_decode(text, place)
            require_shallow(value)
        except (ValueError, RecursionError) as error:
            raise _invalid(file, line=line, error=error) from error
        yield _object(value, source=text[place:end], file=file, line=line)
        place = _after_space(text, end)
        if in_array and text[place : place + 1] == ",":
            place = _after_space(text, place + 1)
        elif in_array and text[place : place + 1] != "]":
            raise DataError(f"{file.where}, line {line}: is not valid JSON (the array has no comma here, or does not end). Correct it.")
    if in_array and (place >= len(text) or _after_space(text, place + 1) < len(text)):
        raise DataError(f"{file.where} is not valid JSON (its array does not end, or something follows it). Restore or correct it.")


def _after_space(text: str, place: int) -> int:
    while text[place : place + 1] in {" ", "\t", "\n", "\r"}:
        place += 1
    return place


def _json_row(source: str, *, file: CorpusFile, line: int) -> _JsonRow:
    try:
        value = parse_json(source)
    except ValueError as error:
        raise _invalid(file, line=line, error=error) from error
    return _object(value, source=source, file=file, line=line)


def _object(value: Any, *, source: str, file: CorpusFile, line: int) -> _JsonRow:
    if not isinstance(value, dict):
        raise DataError(f"{file.where}, line {line}: must be an object with the columns as keys, but has type {type(value).__name__}.")
    return _JsonRow(line, source, value)


def _invalid(file: CorpusFile, *, line: int, error: Exception) -> DataError:
    reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else reason_of(error)
    return DataError(f"{file.where}, line {line}: is not valid JSON ({reason}). Correct or remove it.")
