"""Rows of Parquet files."""

import io
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from ..store.errors import DataError
from .files import CorpusFile
from .opened_file import require_small_expansion
from .rows import BATCH_ROWS, Columns, Rows, require_columns

_READ_ROWS = 50  # at once: a text that is stored once may occur in each row, and its size is only known in memory


def parquet_names(data: io.BufferedReader) -> list[str]:
    """The columns of a file."""
    return pyarrow.parquet.ParquetFile(data).schema_arrow.names


def parquet_batches(data: io.BufferedReader, file: CorpusFile, columns: Columns) -> Iterator[Rows]:
    """The rows of a file, numbered from 0."""
    opened = pyarrow.parquet.ParquetFile(data)
    names = opened.schema_arrow.names
    require_columns(columns.required, names=names, where=file.where)
    wanted, row, n_bytes = [name for name in columns.all if name in names], 0, 0
    values: dict[str, list[Any]] = {name: [] for name in wanted}
    first = 0  # row of the values
    require_small_expansion(sum(opened.metadata.row_group(index).total_byte_size for index in range(opened.num_row_groups)), file=file)
    for batch in opened.iter_batches(batch_size=_READ_ROWS, columns=wanted):
        read = {name: _plain(batch.column(name)) for name in wanted}
        n_bytes += sum(column.nbytes for column in read.values())  # a text that is stored once counts for each of its rows
        require_small_expansion(n_bytes, file=file)
        for name in wanted:
            values[name] += _values(read[name], file=file, first_row=row)
        row += len(batch)
        if row - first >= BATCH_ROWS:
            yield Rows.of(values, where=file.where, unit="row", numbers=range(first, row), columns=columns)
            values, first = {name: [] for name in wanted}, row
    if row > first:
        yield Rows.of(values, where=file.where, unit="row", numbers=range(first, row), columns=columns)


def _plain(column: Any) -> Any:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _values(column: Any, *, file: CorpusFile, first_row: int) -> list[Any]:
    """The Python values of a column; text is decoded row by row, so that a message can name the row."""
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type)):
        return _nested_values(column, file=file, first_row=first_row)
    values: list[Any] = []
    for row, encoded in enumerate(column.cast(pa.large_binary()).to_pylist(), start=first_row):
        try:
            values.append(None if encoded is None else encoded.decode())
        except UnicodeDecodeError as error:
            raise DataError(f"{file.where}, row {row}: the text is not valid UTF-8 ({error}). Correct or remove this row.") from error
    return values


def _nested_values(column: Any, *, file: CorpusFile, first_row: int) -> list[Any]:
    try:
        return column.to_pylist()
    except (ValueError, OverflowError) as error:  # bytes that are not UTF-8; dates that Python cannot represent
        rows = f"rows {first_row} to {first_row + len(column) - 1}"
        raise DataError(f"{file.where}, {rows}: a value cannot be read ({error}). Correct or remove this row.") from error
