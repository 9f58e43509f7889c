"""Tables for SQL without a copy of the data: DuckDB requests columns and passes a filter, and only what these need is read.

DuckDB pushes projection and filters into Python only through a `pyarrow.dataset.Dataset` subclass. Data that cannot match the filter is
skipped level by level, before it is opened: datasets, then documents (and with them parts), then segments. Rows of neighbouring segments
are read together, decoded, filtered and streamed, with two threads reading ahead.

All levels use one test. The filter is evaluated over rows in which the columns of deeper levels are unknown (NULL). SQL's three-valued
logic then gives FALSE only if no value of the unknown columns could make it true.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from numpy.typing import NDArray

from ..arrays import CHUNK_ROWS

_READ_BYTES = 16 << 20  # decoded at once, about; up to _AHEAD as many are in memory
_THREADS = 2
_AHEAD = 4  # finished reads that may wait for their reader
LABEL = pa.dictionary(pa.int32(), pa.string())  # a text that many rows share

# How DuckDB 2 passes `column IN (…)`: unknown stays unknown. DuckDB 1.5 passes `is_in` alone, which makes an unknown column FALSE.
_GUARDED_IN = re.compile(r"if_else\(is_valid\((\w+)\), is_in\(\1, ")
_CALL = re.compile(r"(\w+)\((?=(\w*))")  # a function and what its first argument begins with
_STRICT = frozenset({"invert"})  # functions whose result for unknown is unknown


@dataclass(slots=True)
class ScanStats:
    """How much one scan of one table read."""

    table: str
    columns: list[str]  # those that were computed, for the result or for the filter
    filter: str | None
    parts: int = 0
    segments: int = 0
    rows: int = 0


class PartRows(Protocol):
    """The rows of one part of one dataset, from which a table's columns are computed."""

    doc_id_S: NDArray[np.int64]
    segment_S: NDArray[np.int64]
    n_rows_S: NDArray[np.int64]  # rows are stored segment after segment in the part's arrays

    def labels(self) -> dict[str, pa.Array]:
        """The columns that are constant per segment, [S]."""

    def row_bytes(self, names: Iterable[str]) -> int:
        """About how many bytes the named columns take per row."""

    def columns(self, names: Iterable[str], *, segments: NDArray[np.int64]) -> dict[str, pa.Array]:
        """The named columns of the rows of some segments (ascending), one entry per row of the table."""


class TableContent(Protocol):
    """The data behind a lazy table."""

    name: str
    schema: pa.Schema
    dataset_columns: Sequence[str]  # constant per dataset
    document_columns: Sequence[str]  # constant per document
    segment_columns: Sequence[str]  # constant per segment, including both above

    def datasets(self) -> pa.Table:
        """A row per dataset: `dataset_columns`."""

    def documents(self) -> pa.Table:
        """A row per document of every corpus: `document_columns`, including corpus and part."""

    def parts(self, *, datasets: NDArray[np.bool_], corpus_parts: set[tuple[str, int]] | None) -> Iterator[PartRows]:
        """The parts of the datasets for which the mask is true; only the named parts, if any are named."""


class LazyTable(pads.Dataset):
    """A table whose rows are made on request."""

    def __init__(self, content: TableContent, *, on_scan: Callable[[ScanStats], None], on_error: Callable[[BaseException], None]) -> None:
        """`on_scan` receives each scan; `on_error` each error of a scan, because DuckDB passes on only its text."""
        self._content, self._on_scan, self._on_error = content, on_scan, on_error

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns."""
        return self._content.schema

    def scanner(self, columns: Sequence[str] | None = None, filter: pc.Expression | None = None, **_: Any) -> "_Scan":  # noqa: A002
        """Begin a scan; called by DuckDB."""
        names = list(columns) if columns is not None else self.schema.names
        stats = ScanStats(
            table=self._content.name,
            columns=[name for name in self.schema.names if name in {*names, *_mentioned(filter, self.schema)}],
            filter=None if filter is None else str(filter),
        )
        self._on_scan(stats)
        return _Scan(pa.schema([self.schema.field(name) for name in names]), lambda: self._guarded(self._batches(names, filter, stats)))

    def _guarded(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        try:
            yield from batches
        except Exception as error:
            self._on_error(error)
            raise

    def _batches(self, names: list[str], wanted: pc.Expression | None, stats: ScanStats) -> Iterator[pa.RecordBatch]:
        """The rows, in order, as they are read, with a few reads ahead."""
        reads = self._reads(wanted, stats)
        first = list(islice(reads, 2))
        if len(first) < 2:  # for example one document: starting threads would take longer than reading it
            yield from (self._read(*read, names, wanted, stats) for read in first)
            return
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="scan") as pool:
            pending: deque[Future[pa.RecordBatch]] = deque()
            try:
                for read in chain(first, reads):
                    pending.append(pool.submit(self._read, *read, names, wanted, stats))
                    if len(pending) >= _AHEAD:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:  # also when the query ends early
                for future in pending:
                    future.cancel()

    def _reads(self, wanted: pc.Expression | None, stats: ScanStats) -> Iterator[tuple[PartRows, NDArray[np.int64]]]:
        """What to read: the segments of a part that may match, in runs that are read at once."""
        content = self._content
        datasets = _keep(wanted, content.datasets(), known=content.dataset_columns, schema=self.schema)
        corpus_parts = None
        if wanted is not None:
            documents = content.documents()
            kept = documents.filter(pa.array(_keep(wanted, documents, known=content.document_columns, schema=self.schema)))
            if len(kept) < len(documents):
                pairs = kept.select(["corpus", "part"]).group_by(["corpus", "part"]).aggregate([])
                corpus_parts = set(zip(pairs["corpus"].to_pylist(), pairs["part"].to_pylist(), strict=True))
        for rows in content.parts(datasets=datasets, corpus_parts=corpus_parts):
            kept_S = _keep(wanted, pa.table(rows.labels()), known=content.segment_columns, schema=self.schema)
            kept_S &= rows.n_rows_S > 0
            stats.parts += bool(kept_S.any())
            stats.segments += int(kept_S.sum())
            most_rows = max(CHUNK_ROWS, _READ_BYTES // max(1, rows.row_bytes(stats.columns)))  # rows without entries have no bytes
            for run in runs(np.flatnonzero(kept_S), n_rows_S=rows.n_rows_S, most_rows=most_rows):
                yield rows, run

    def _read(
        self, rows: PartRows, segments: NDArray[np.int64], names: list[str], wanted: pc.Expression | None, stats: ScanStats
    ) -> pa.RecordBatch:
        # If the filter only uses columns of whole segments, the choice of segments has already applied it.
        rest = wanted if _mentioned(wanted, self.schema) - set(self._content.segment_columns) else None
        needed = {*names, *_mentioned(rest, self.schema)}
        columns = rows.columns([name for name in self.schema.names if name in needed], segments=segments)
        batch = pa.record_batch(columns)
        if rest is not None:
            mask = pads.dataset(pa.table(columns)).to_table(columns={"keep": rest})["keep"]
            batch = batch.filter(pc.fill_null(mask, False).combine_chunks())
        stats.rows += batch.num_rows
        return batch.select(names).cast(pa.schema([self.schema.field(name) for name in names]))


class _Scan:
    """DuckDB uses it as a `pyarrow.dataset.Scanner`."""

    def __init__(self, schema: pa.Schema, batches: Callable[[], Iterator[pa.RecordBatch]]) -> None:
        self.schema = self.projected_schema = schema
        self._batches = batches

    def to_reader(self) -> pa.RecordBatchReader:
        return pa.RecordBatchReader.from_batches(self.schema, self._batches())


def runs(segments: NDArray[np.int64], *, n_rows_S: NDArray[np.int64], most_rows: int) -> Iterator[NDArray[np.int64]]:
    """Split chosen segments (ascending) of a part at gaps of a chunk or more, and after at most `most_rows` rows."""
    ends_S = np.cumsum(n_rows_S)
    starts_S = ends_S - n_rows_S
    far = np.flatnonzero(starts_S[segments[1:]] - ends_S[segments[:-1]] >= CHUNK_ROWS) + 1
    for near in np.split(segments, far):
        while len(near):
            n = max(1, int(np.searchsorted(ends_S[near], starts_S[near[0]] + most_rows, side="right")))
            yield near[:n]
            near = near[n:]


def _mentioned(wanted: pc.Expression | None, schema: pa.Schema) -> set[str]:
    """The columns that a filter uses; perhaps also one whose name occurs as a text in the filter."""
    return set() if wanted is None else set(re.findall(r"\w+", str(wanted))) & set(schema.names)


def _keep(wanted: pc.Expression | None, table: pa.Table, *, known: Sequence[str], schema: pa.Schema) -> NDArray[np.bool_]:
    """Which rows may satisfy the filter, for any values of the unknown columns."""
    if wanted is None or not _unknown_stays_unknown(wanted, known):
        return np.ones(len(table), np.bool_)
    unknown = {name: pa.nulls(len(table), schema.field(name).type) for name in schema.names if name not in known}
    columns = [unknown[name] if name in unknown else table[name] for name in schema.names]
    verdict = pads.dataset(pa.table(columns, schema=schema)).to_table(columns={"verdict": wanted})["verdict"]
    return pc.fill_null(verdict, True).to_numpy()


def _unknown_stays_unknown(wanted: pc.Expression, known: Sequence[str]) -> bool:
    """Whether the filter gives NULL for an unknown column, and not TRUE or FALSE as `IS NULL` does."""
    text = _GUARDED_IN.sub("(", str(wanted))
    return all(function in _STRICT or argument in known for function, argument in _CALL.findall(text))
