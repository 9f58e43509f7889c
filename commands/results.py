"""Writes the result of a query batch by batch: as a table, csv, json or parquet."""

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from ..store.errors import UsageError
from ..store.output_file import open_output, require_outside_workspaces
from ..store.shown import harmless
from ..store.sql.answer import Answer
from .console import show_table
from .terminal import binary_output, say

_Write = Callable[[Answer, BinaryIO], None]
_SHOWN_ROWS = 1000  # of a table: nobody reads more, and the widths of its columns must be known before the first row
_LEAST_WIDTH = 8  # of a column: a table with narrower columns is shown row by row


def style_for(style: str | None, *, output: Path | None) -> str:
    """The format to write: the given one, else the one of the file's name, else a table.

    Raises:
        UsageError: the format does not fit the output.
    """
    if output is None:
        if style == "parquet":
            raise UsageError("--format parquet needs --output FILE.")
        return style or "table"
    if not output.parent.is_dir():
        raise UsageError(f"--output ({output}): the folder {output.parent} does not exist.")
    require_outside_workspaces(output, what="--output")
    chosen = style or output.suffix.removeprefix(".")
    if chosen not in {"csv", "json", "parquet"}:
        raise UsageError(f"--output ({output}) needs --format csv, json or parquet, or a name with one of these endings.")
    return chosen


def write_result(answer: Answer | None, *, style: str, output: Path | None) -> None:
    """Stream a result to a file or the standard output; a table shows only its first rows. A statement without a result writes nothing.

    Raises:
        UsageError: the format cannot hold one of the values.
    """
    if answer is None:
        return
    try:
        if style == "table":
            _show_beginning(answer)
            return
        write: _Write = {"json": _write_json, "parquet": _write_parquet}.get(style, _write_csv)
        with _opened(output) as file:
            write(answer, file)
    except UsageError:  # about the output file
        raise
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, ValueError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"Cast the column to a plain type, for example VARCHAR: the result cannot be written as {style} ({reason})."
        ) from error


@contextmanager
def _opened(output: Path | None) -> Iterator[BinaryIO]:
    """The standard output, or a file."""
    if output is None:
        stream = binary_output()
        yield stream
        stream.flush()
        return
    with open_output(output, what="--output") as file:
        yield file


def _write_csv(answer: Answer, file: BinaryIO) -> None:
    """Write csv, with lists, structs and bytes as JSON."""
    for index, frame in enumerate(_frames(answer)):
        as_json = [name for name, kind in frame.schema.items() if kind.is_nested() or kind == pl.Binary]
        texts = [pl.Series(name, [_cell_text(value) for value in frame[name].to_list()], dtype=pl.String) for name in as_json]
        file.write(frame.with_columns(texts).write_csv(include_header=index == 0).encode())


def _write_json(answer: Answer, file: BinaryIO) -> None:
    """Write one array with an object per line. NaN and infinity become null, because JSON has neither."""
    before = "[\n"
    for frame in _frames(answer):
        for row in frame.iter_rows(named=True):
            file.write(f"{before}{_json(row)}".encode())
            before = ",\n"
    file.write(b"[]\n" if before == "[\n" else b"\n]\n")


def _write_parquet(answer: Answer, file: BinaryIO) -> None:
    with pq.ParquetWriter(file, answer.schema, compression="zstd") as writer:
        for batch in answer:
            writer.write_batch(batch)


def _frames(answer: Answer) -> Iterator[pl.DataFrame]:
    """An empty frame that has the columns, then the batches."""
    for table in chain([answer.schema.empty_table()], answer):
        yield pl.DataFrame(pl.from_arrow(table))


def _json(value: Any) -> str:
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """A value in JSON's types: other types become text, and bytes that are not UTF-8 become `\\xe2`."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case bytes():
            return value.decode(errors="backslashreplace")
        case Decimal():
            return int(value) if value == value.to_integral_value() else float(value)
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case date():
            return value.isoformat()
        case None | bool() | int() | str():
            return value
        case _:
            return str(value)


def _show_beginning(answer: Answer) -> None:
    frames, n_rows = [], 0
    for frame in _frames(answer):
        frames.append(frame)
        n_rows += len(frame)
        if n_rows > _SHOWN_ROWS:
            break
    columns = answer.schema.names
    rows = [[_shown(value) for value in row] for frame in frames for row in frame.iter_rows()][:_SHOWN_ROWS]
    if columns == ["explain_key", "explain_value"]:
        say("\n".join(frame["explain_value"].str.join("\n").item() for frame in frames if len(frame)))
    elif sys.stdout.isatty() and len(columns) * (_LEAST_WIDTH + 3) > shutil.get_terminal_size().columns:
        _show_row_by_row(columns, rows)
    else:
        numeric = [pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind) for kind in answer.schema.types]
        show_table(columns, rows, right=numeric)
    if n_rows > _SHOWN_ROWS:
        say(f"Only the first {_SHOWN_ROWS:,} rows are shown. For all rows, use --format csv, json or parquet.")


def _show_row_by_row(columns: list[str], rows: list[list[str]]) -> None:
    shown = [harmless(column, one_line=True) for column in columns]
    width = max(map(len, shown))
    for number, row in enumerate(rows, start=1):
        say(f"-- row {number} --")
        for column, value in zip(shown, row, strict=True):
            say(f"{column:>{width}}: {value}")


def _shown(value: Any) -> str:
    """A value in a table: short numbers, and text in quotes if it has white space that would be invisible."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = _cell_text(value) or ""
    return text if text.isprintable() and text == text.strip() else _json(text)


def _cell_text(value: Any) -> str | None:
    """The text of a value that is not a number."""
    if value is None:
        return None
    plain = _plain(value)
    return plain if isinstance(plain, str) else _json(value)
