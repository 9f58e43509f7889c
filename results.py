"""The result of a query, written batch by batch: as a table to look at, csv, json or parquet."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import click
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from .console import show_table
from .store import durable
from .store.errors import UsageError

_Write = Callable[[pa.RecordBatchReader, BinaryIO], None]
_SHOWN_ROWS = 1000  # of a table: more cannot be looked at, and its columns' widths must be known before the first row


def write_result(batches: pa.RecordBatchReader | None, *, style: str, output: Path | None) -> None:
    """Write a result as it comes, to a file or the standard output; in a table, its beginning. A statement without a result writes nothing.

    Raises:
        UsageError: the format has no place for one of its types.
    """
    if batches is None:
        return
    if style == "table" and output is None:
        _show_beginning(batches)
        return
    write: _Write = {"json": _write_json, "parquet": _write_parquet}.get(style, _write_csv)  # a table in a file is csv
    with _opened(output) as file:
        try:
            write(batches, file)
        except pl.exceptions.PolarsError as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"The result cannot be written as {style}: {reason}. Cast its columns to plain types.") from error


@contextmanager
def _opened(output: Path | None) -> Iterator[BinaryIO]:
    """The standard output, or a file that appears under its name when it is complete."""
    if output is None:
        stream = sys.stdout.buffer
        yield stream
        stream.flush()
    elif output.exists() and not output.is_file():  # a pipe or a device: to be written to, not replaced
        with output.open("wb") as file:
            yield file
    else:
        temporary = durable.temporary_sibling(output)
        try:
            with temporary.open("wb") as file:
                yield file
            os.replace(temporary, output)
        finally:
            temporary.unlink(missing_ok=True)


def _write_csv(batches: pa.RecordBatchReader, file: BinaryIO) -> None:
    for index, frame in enumerate(_frames(batches)):
        nested = [name for name, kind in frame.schema.items() if kind.is_nested()]
        texts = [pl.Series(name, [_json(value) for value in frame[name].to_list()], dtype=pl.String) for name in nested]
        frame.with_columns(texts).write_csv(file, include_header=index == 0)


def _write_json(batches: pa.RecordBatchReader, file: BinaryIO) -> None:
    """One array of objects, a line each; JSON has no NaN and no infinity, which become null."""
    before = "[\n"
    for frame in _frames(batches):
        finite = pl.selectors.float()
        for row in frame.with_columns(pl.when(finite.is_finite()).then(finite)).iter_rows(named=True):
            file.write(f"{before}{_json(row)}".encode())
            before = ",\n"
    file.write(b"[]\n" if before == "[\n" else b"\n]\n")


def _write_parquet(batches: pa.RecordBatchReader, file: BinaryIO) -> None:
    with pq.ParquetWriter(file, batches.schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)


def _frames(batches: pa.RecordBatchReader) -> Iterator[pl.DataFrame]:
    """The batches, after an empty one, which has the columns."""
    for table in chain([batches.schema.empty_table()], batches):
        yield pl.DataFrame(pl.from_arrow(table))


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> str | float:
    """What JSON has no type for, as a text or a number."""
    match value:
        case bytes():
            return value.decode(errors="backslashreplace")
        case Decimal():
            return float(value)
        case date():
            return value.isoformat()
        case _:
            return str(value)


def _show_beginning(batches: pa.RecordBatchReader) -> None:
    frames, n_rows = [], 0
    for frame in _frames(batches):
        frames.append(frame)
        n_rows += len(frame)
        if n_rows > _SHOWN_ROWS:
            break
    columns = batches.schema.names
    rows = [[_cell(value) for value in row] for frame in frames for row in frame.iter_rows()]
    show_table(columns, rows[:_SHOWN_ROWS])
    if n_rows > _SHOWN_ROWS:
        click.echo(f"These are the first {_SHOWN_ROWS:,} rows; for all of them, use --format csv, json or parquet.")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else _json(value) if isinstance(value, list | dict) else str(value)
    return str(text).replace("\r", "\\r").replace("\n", "\\n").replace("\t", "\\t")  # what a token stands for may be a line break
