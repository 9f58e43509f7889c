"""SQL over a workspace: the catalog's tables, and lazy tables over all stored data.

    with Workspace.open(folder).database.connect() as connection: ...      # a DuckDB connection
    Workspace.open(folder).sql("SELECT …")                                  # a polars table

Read-only by construction: the catalog is opened read-only, the lazy tables cannot be written, and access to other files is locked off
unless `external_access` is set.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa

from .. import catalog
from ..catalog_file import SPILL_LIMIT, Limits
from ..layout import Layout
from .answer import Answer, Query
from .lazy_table import LazyTable, ScanStats
from .parquet_tables import PARQUET_TABLES
from .statement import Statement, checked, require_no_writing
from .store_reader import StoreReader
from .tables import ARRAY_TABLES

_BATCH_ROWS = 65_536  # of a streamed result
LAZY_TABLES = (*(table.name for table in ARRAY_TABLES), *(table.name for table in PARQUET_TABLES))
Parameters = Sequence[Any] | Mapping[str, Any] | None


@dataclass(slots=True)
class QueryStats:
    """How much one query read of the stored arrays."""

    seconds: float = 0.0
    chunks: int = 0
    stored_bytes: int = 0  # on the disk
    scans: list[ScanStats] = field(default_factory=list)


class Database:
    """SQL over a workspace. Between two queries nothing is locked, so that a run can update the catalog."""

    def __init__(
        self, layout: Layout, *, external_access: bool = False, memory_limit: int | None = None, spill_limit: int = SPILL_LIMIT
    ) -> None:
        """Query a workspace.

        Args:
            layout: the workspace.
            external_access: queries may read and write files outside the workspace.
            memory_limit: bytes of memory that DuckDB may use for a query; by default at most half of the machine's.
            spill_limit: bytes of temporary files that a query may write when it needs more memory.
        """
        self.layout, self._external_access = layout, external_access
        self._limits = Limits(memory=memory_limit, spill=spill_limit)
        self.stats = QueryStats()  # of the last query
        self._store: StoreReader | None = None
        self._version: tuple[int, ...] | None = None
        self._users = 0  # of the connection that `_held` keeps open
        self._is_asked = False  # whether a query is running on it
        self._reports = _Reports()
        self._held = ExitStack()
        self._lock = Lock()

    def sql(self, query: str, parameters: Parameters = None) -> pl.DataFrame:
        """The result of a query as a table; empty for a statement without a result.

        Raises:
            UsageError: the query is wrong.
            DataError: there is no catalog yet.
            DamagedPart: data that it needs is damaged.
        """
        with self.stream(query, parameters) as answer:
            return pl.DataFrame() if answer is None else pl.DataFrame(pl.from_arrow(answer.table()))

    def tables(self) -> dict[str, list[str]]:
        """All tables and their columns."""
        query = "SELECT table_name, list(column_name ORDER BY column_index) FROM duckdb_columns() WHERE NOT internal GROUP BY ALL"
        return dict(sorted(row for row in self.sql(query).iter_rows() if row[0] != "migrations"))

    @contextmanager
    def stream(self, query: str, parameters: Parameters = None) -> Iterator[Answer | None]:
        """The result of a query batch by batch; None for a statement without a result. See `sql` for the errors."""
        statement = checked(query, external_access=self._external_access, workspace=self.layout.root)
        stats = QueryStats()
        with self._hold() as store, self._free_connection(store) as (connection, reports):
            reports.scans, reports.causes, self.stats = stats.scans, [], stats
            before, started = (store.reads.chunks, store.reads.stored_bytes), time.perf_counter()
            with closing(Query(connection, causes=reports.causes)) as running:
                try:
                    reader = running.run(lambda: _begun(connection, statement, parameters))
                    with nullcontext() if reader is None else closing(reader):  # an unfinished reader would keep the catalog open
                        yield None if reader is None else Answer(reader, query=running)
                finally:
                    stats.seconds = time.perf_counter() - started
                    stats.chunks, stats.stored_bytes = store.reads.chunks - before[0], store.reads.stored_bytes - before[1]

    @contextmanager
    def connect(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection with all tables, for many queries: opening one takes DuckDB longer than a small query.

        In the `with` block `sql` and `stream` use it too. While it is open, no run can update the catalog.
        """
        with self._hold() as store:
            yield store.connection

    @contextmanager
    def _hold(self) -> Iterator[StoreReader]:
        """Keep the catalog open. Cached data of the workspace is kept unless the catalog has changed."""
        with self._lock:
            if not self._users:
                self._store = self._open()
            store = self._store
            assert store is not None
            self._users += 1
        try:
            yield store
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._held.close()

    def _open(self) -> StoreReader:
        connection = self._held.enter_context(catalog.reading(self.layout, limits=self._limits, external_access=self._external_access))
        facts = self.layout.catalog_path.stat()
        version = (facts.st_ino, facts.st_mtime_ns, facts.st_size)
        if self._store is None or version != self._version:
            self._store, self._version = StoreReader(self.layout, connection), version
            self._arrays = [table(self._store) for table in ARRAY_TABLES]
        self._store.connection = connection
        self._register(connection, self._store, reports=self._reports)
        return self._store

    @contextmanager
    def _free_connection(self, store: StoreReader) -> Iterator[tuple[duckdb.DuckDBPyConnection, "_Reports"]]:
        """The connection, or a cursor of it while another query is running; and the reports of its tables."""
        with self._lock:
            is_free, self._is_asked = not self._is_asked, True
        if not is_free:
            with store.connection.cursor() as cursor:
                reports = _Reports()
                self._register(cursor, store, reports=reports)  # 3 ms
                yield cursor, reports
            return
        try:
            yield store.connection, self._reports
        finally:
            self._is_asked = False

    def _register(self, connection: duckdb.DuckDBPyConnection, store: StoreReader, *, reports: "_Reports") -> None:
        for content in self._arrays:
            connection.register(content.name, LazyTable(content, on_scan=reports.on_scan, on_error=reports.on_error))
        for table in PARQUET_TABLES:
            connection.register(table.name, table(store, on_scan=reports.on_scan, on_error=reports.on_error))


class _Reports:
    """Collects the reports of a connection's lazy tables about its query."""

    def __init__(self) -> None:
        self.scans: list[ScanStats] = []
        self.causes: list[BaseException] = []

    def on_scan(self, scan: ScanStats) -> None:
        """Record the scan of a table."""
        self.scans.append(scan)

    def on_error(self, cause: BaseException) -> None:
        """Record the error of a scan."""
        self.causes.append(cause)


def _begun(connection: duckdb.DuckDBPyConnection, statement: Statement, parameters: Parameters) -> pa.RecordBatchReader | None:
    require_no_writing(connection, statement)
    relation = connection.sql(statement.text, params=parameters)
    return None if relation is None else relation.to_arrow_reader(_BATCH_ROWS)
