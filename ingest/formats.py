"""Reads a file of a corpus, of any kind: streaming, and only the needed columns.

Values are read as written. Each kind has its own module, `read_parquet`, `read_csv` and `read_json`; a text file is one document.
"""

import io
from collections.abc import Iterator

from ..store.errors import DataError
from .files import CorpusFile
from .opened_file import LARGEST_TEXT, decoded, opened_file
from .read_csv import csv_batches, csv_names
from .read_json import json_batches, json_names
from .read_parquet import parquet_batches, parquet_names
from .rows import Columns, Rows, require_columns

_BATCHES = {"parquet": parquet_batches, "csv": csv_batches, "json": json_batches}


def column_names(file: CorpusFile) -> list[str]:
    """The columns of a file; for JSON those of its first rows.

    Raises:
        DataError: the file cannot be read.
    """
    with opened_file(file) as data:
        match file.kind:
            case "parquet":
                return parquet_names(data)
            case "csv":
                return csv_names(data, file=file)
            case "json":
                return json_names(data, file=file)
            case "txt":
                return ["text"]


def read_rows(file: CorpusFile, columns: Columns) -> Iterator[Rows]:
    """The rows of a file, a batch at a time.

    Raises:
        DataError: the file cannot be read, lacks a column, or has an invalid row; the text names the file and the line or row.
    """
    with opened_file(file) as data:
        yield from _BATCHES.get(file.kind, _txt_batches)(data, file, columns)


def _txt_batches(data: io.BufferedReader, file: CorpusFile, columns: Columns) -> Iterator[Rows]:
    require_columns(columns.required, names=["text"], where=f"{file.where}, a text file,")
    text = data.read(LARGEST_TEXT + 1)
    if len(text) > LARGEST_TEXT:
        raise DataError(
            f"{file.where}: must have at most {LARGEST_TEXT >> 20:,} MiB, because it is one document. Split it into several files."
        )
    yield Rows.of({"text": [decoded(text, file=file)]}, where=file.where, unit="", numbers=[0], columns=columns)
