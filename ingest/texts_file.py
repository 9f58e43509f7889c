"""The documents of a corpus as read, while its parts are made: `corpus/<name>/texts.arrow`, a row per document of the source.

Files of a corpus are read once, from beginning to end; the documents of a part may be anywhere in them. This file is removed when all
parts exist, and made again from the source if it is needed later.

Columns: source_split; text; for conversations also the ranges of `chat.marked_text`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl
import pyarrow as pa

from ..store import durable
from .chat.marked_text import MarkedText, columns_of, segments_of

NAME = "texts.arrow"


class TextsWriter:
    """Appends documents to a file of texts."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._writer: Any = None

    def add(self, texts: Sequence[MarkedText], *, source_split: str, has_marks: bool) -> None:
        """Append the next documents of a split. The documents of a split must be consecutive."""
        marks = columns_of(texts) if has_marks else {}
        table = pl.DataFrame(
            {"source_split": [source_split] * len(texts), "text": [each.text for each in texts], **marks},
            schema_overrides={"source_split": pl.String, "text": pl.String},
        ).to_arrow(compat_level=pl.CompatLevel.oldest())
        if self._writer is None:
            self._writer = pa.ipc.new_file(self._file, table.schema)
        self._writer.write_table(table)

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()


@contextmanager
def writing_texts(folder: Path) -> Iterator[TextsWriter]:
    """Write the texts of a corpus into its folder; the file appears when it is complete."""
    path = folder / NAME
    with durable.temporary(path) as temporary:
        with temporary.open("wb") as file:
            writer = TextsWriter(file)
            yield writer
            writer.close()
        durable.publish(temporary, to=path)


def remove_texts(folder: Path) -> None:
    """Remove the texts of a corpus, if they exist."""
    if (folder / NAME).exists():
        durable.remove(folder / NAME)


class ReadTexts:
    """A file of texts, mapped into memory."""

    def __init__(self, batches: Sequence[pa.RecordBatch]) -> None:
        self._batches = batches
        self._starts = np.cumsum([0, *map(len, batches)])
        self._first: dict[str, int] = {}  # first row of each split in the file
        for batch, start in zip(batches, self._starts.tolist(), strict=False):
            if len(batch):  # a batch holds documents of one split
                self._first.setdefault(batch.column("source_split")[0].as_py(), start)

    @classmethod
    def open(cls, folder: Path) -> Self | None:
        """The texts of a corpus, if they exist."""
        path = folder / NAME
        if not path.exists():
            return None
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        return cls([file.get_batch(index) for index in range(file.num_record_batches)])

    def take(self, rows: Sequence[int], *, source_split: str) -> list[MarkedText]:
        """Some documents of a split, by their rows in it.

        Raises:
            IndexError: a row does not exist.
        """
        rows_N = self._first.get(source_split, self._starts[-1]) + np.array(rows, np.int64)
        if len(rows_N) and rows_N.max() >= self._starts[-1]:
            raise IndexError(f"{NAME} has no row {rows_N.max()}")
        batch_N = np.searchsorted(self._starts, rows_N, side="right") - 1
        order_N = np.argsort(batch_N, kind="stable")
        # Batch by batch, because pyarrow would first copy all batches to take from them together.
        pieces = [
            self._batches[index].take(pa.array(rows_N[order_N][batch_N[order_N] == index] - self._starts[index]))
            for index in np.unique(batch_N).tolist()
        ]
        taken = pl.from_arrow(pa.Table.from_batches(pieces))
        assert isinstance(taken, pl.DataFrame)
        texts = segments_of(taken) if "messages" in taken.columns else [MarkedText(text=text) for text in taken["text"]]
        return [texts[place] for place in np.argsort(order_N).tolist()]
