"""SQL over a workspace: the catalog's tables, and lazy tables over everything that is stored.

    with Workspace.open(folder).database.connect() as connection: ...      # a DuckDB connection
    Workspace.open(folder).sql("SELECT …")                                  # a polars table

Read-only by construction: the catalog is opened read-only, the lazy tables cannot be written, and access to other files is off, for good,
unless it is asked for by name.
"""

import re
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

import duckdb
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from . import catalog
from .dataset import Dataset
from .errors import FuselineError, UsageError
from .lazy_table import LABEL, LazyTable, ScanStats
from .parquet_tables import PARQUET_TABLES
from .part import PartArrays, Reads
from .tables import SOURCES
from .tokenizer import token_texts

if TYPE_CHECKING:
    from .workspace import Workspace

_OPEN_PARTS = 256  # about 0.2 MB each
_PARAMETER = re.compile(r"\$(\w+)")
_BATCH_ROWS = 65_536  # of a streamed result
LAZY_TABLES = (*(source.name for source in SOURCES), *(table.name for table in PARQUET_TABLES))
Parameters = Sequence[Any] | Mapping[str, Any] | None


@dataclass(slots=True)
class QueryStats:
    """What one query read of the stored arrays."""

    seconds: float = 0.0
    chunks: int = 0
    stored_bytes: int = 0  # as they lie on the disk
    scans: list[ScanStats] = field(default_factory=list)


class Documents:
    """The documents of a corpus, by id: ids count from 0 without gaps."""

    def __init__(self, table: pa.Table) -> None:
        assert not len(table) or table["doc_id"][-1].as_py() == len(table) - 1
        self.table = table
        self._labels = {name: table[name].combine_chunks() for name in ("domain", "split")}

    def labels(self, name: str, doc_ids: NDArray[Any]) -> pa.Array:
        """The domain or split of some documents."""
        return self._labels[name].take(pa.array(doc_ids))


class Store:
    """What the lazy tables read from: the catalog as it is now, and parts, which are opened once."""

    def __init__(self, workspace: "Workspace", connection: duckdb.DuckDBPyConnection) -> None:
        self.workspace, self.reads = workspace, Reads()
        self.connection = connection
        self.sources = [source(self) for source in SOURCES]
        self._documents: dict[str, Documents] | None = None
        self._datasets: dict[tuple[str, str], Dataset] = {}
        self._parts: OrderedDict[tuple[str, str, int], PartArrays] = OrderedDict()
        self._texts: dict[str, pa.Array] = {}
        self._lock = Lock()  # two threads read

    def catalog_rows(self, query: str) -> list[dict[str, Any]]:
        """Rows of the catalog."""
        return self.connection.cursor().sql(query).pl().to_dicts()

    def catalog_arrays(self, query: str, parameters: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Columns of the catalog; of the parameters, those that the query names are taken."""
        named = {name: parameters[name] for name in _PARAMETER.findall(query)}
        return dict(self.connection.cursor().execute(query, named).fetchnumpy())

    def all_documents(self) -> pa.Table:
        """A row per document of every corpus: corpus, domain, split, part, doc_id."""
        tables = [documents.table for documents in self._by_corpus.values()]
        return pa.concat_tables(tables).unify_dictionaries() if tables else _DOCUMENTS.empty_table()

    def documents(self, corpus: str) -> Documents:
        """The documents of a corpus."""
        return self._by_corpus[corpus]

    @property
    def _by_corpus(self) -> dict[str, Documents]:
        if self._documents is None:
            names = [row["corpus"] for row in self.catalog_rows("SELECT DISTINCT corpus FROM documents ORDER BY corpus")]
            self._documents = {name: Documents(self._documents_of(name)) for name in names}
        return self._documents

    def _documents_of(self, corpus: str) -> pa.Table:
        query = "SELECT corpus, domain, split, part, doc_id FROM documents WHERE corpus = $corpus ORDER BY doc_id"
        return self.connection.cursor().sql(query, params={"corpus": corpus}).to_arrow_table().cast(_DOCUMENTS)

    def dataset(self, kind: str, name: str) -> Dataset:
        """A dataset, opened once."""
        if (kind, name) not in self._datasets:
            self._datasets[kind, name] = Dataset.open(self.workspace.folder(kind, name))
        return self._datasets[kind, name]

    def arrays(self, kind: str, name: str, part: int) -> PartArrays:
        """The arrays of a part, opened once and kept open while others are not asked for more."""
        key = (kind, name, part)
        with self._lock:
            if key in self._parts:
                self._parts.move_to_end(key)
            else:
                self._parts[key] = self.dataset(kind, name).arrays(part, reads=self.reads)
                if len(self._parts) > _OPEN_PARTS:
                    self._parts.popitem(last=False)
            return self._parts[key]

    def token_texts(self, digest: str) -> pa.Array:
        """The text of each token of a tokenizer, and a null after the last."""
        if digest not in self._texts:
            texts = token_texts(self.workspace.folder("tokenizers", digest))
            self._texts[digest] = pa.array([*texts, None], pa.string())
        return self._texts[digest]


_DOCUMENTS = pa.schema([("corpus", LABEL), ("domain", LABEL), ("split", LABEL), ("part", pa.int32()), ("doc_id", pa.int64())])


class Database:
    """SQL over a workspace. Between two queries nothing is held, so that a run going on can bring the catalog up to date."""

    def __init__(self, workspace: "Workspace", *, external_access: bool = False) -> None:
        """With `external_access` queries may read and write files that are not the workspace's."""
        self.workspace, self._external_access = workspace, external_access
        self.stats = QueryStats()  # of the last query
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._store: Store | None = None
        self._version: tuple[int, ...] | None = None
        self._errors: list[BaseException] = []

    def sql(self, query: str, parameters: Parameters = None) -> pl.DataFrame:
        """The result of a query as a table; empty for a statement that has none.

        Raises:
            UsageError: the query is wrong.
            DataError: there is no catalog yet.
            DamagedPart: what it needs is damaged.
        """
        with self.stream(query, parameters) as reader:
            return pl.DataFrame() if reader is None else pl.DataFrame(pl.from_arrow(reader.read_all()))

    def tables(self) -> dict[str, list[str]]:
        """All tables and their columns."""
        query = "SELECT table_name, list(column_name ORDER BY column_index) FROM duckdb_columns() WHERE NOT internal GROUP BY ALL"
        return dict(sorted(row for row in self.sql(query).iter_rows() if row[0] != "migrations"))

    @contextmanager
    def stream(self, query: str, parameters: Parameters = None) -> Iterator[pa.RecordBatchReader | None]:
        """The result of a query batch by batch; None for a statement that has none. See `sql` for the errors."""
        with self.connect() as connection, self._asked():
            relation = connection.sql(_one_statement(query), params=parameters)
            if relation is None:
                yield None
                return
            reader = relation.to_arrow_reader(_BATCH_ROWS)
            del relation
            try:
                yield _readable(reader)
            finally:
                reader.close()  # what is not read to its end would keep the catalog open

    @contextmanager
    def connect(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection that has all tables, kept for the queries in the `with` block: opening one takes DuckDB longer than a small query.

        While it is open, no run can bring the catalog up to date.
        """
        if self._connection is not None:
            yield self._connection
            return
        with catalog.reading(self.workspace, external_access=self._external_access) as connection:
            store = self._store_of(connection)
            for source in store.sources:
                connection.register(source.name, LazyTable(source, on_scan=self._note, on_error=self._errors.append))
            for table in PARQUET_TABLES:
                connection.register(table.name, table(store, on_scan=self._note, on_error=self._errors.append))
            connection.execute("SET lock_configuration = true")
            self._connection = connection
            try:
                yield connection
            finally:
                self._connection = None

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Measure one query, and say what went wrong in words of the store's where it was the store."""
        self._errors.clear()
        self.stats = QueryStats()
        assert self._store is not None
        before, started = (self._store.reads.chunks, self._store.reads.stored_bytes), time.perf_counter()
        try:
            yield
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            for cause in self._errors:
                if isinstance(cause, FuselineError):
                    raise cause from None
            if isinstance(error, FuselineError):
                raise
            raise UsageError(f"The query failed: {error}") from error
        finally:
            self.stats.seconds = time.perf_counter() - started
            self.stats.chunks = self._store.reads.chunks - before[0]
            self.stats.stored_bytes = self._store.reads.stored_bytes - before[1]

    def _note(self, scan: ScanStats) -> None:
        self.stats.scans.append(scan)

    def _store_of(self, connection: duckdb.DuckDBPyConnection) -> Store:
        """What was read before, unless the catalog has changed since."""
        facts = self.workspace.catalog_path.stat()
        version = (facts.st_ino, facts.st_mtime_ns, facts.st_size)
        if self._store is None or version != self._version:
            self._store, self._version = Store(self.workspace, connection), version
        self._store.connection = connection
        return self._store


def _readable(reader: pa.RecordBatchReader) -> pa.RecordBatchReader:
    """A result in types that every program reads: DuckDB's sums of integers, 128 bits wide, as int64 rather than Arrow's decimals."""
    fields = []
    for column in reader.schema:
        if pa.types.is_interval(column.type):
            raise UsageError(f"The column {column.name} is an interval: say its seconds, epoch({column.name}), or CAST(… AS VARCHAR).")
        is_sum = pa.types.is_decimal128(column.type) and column.type.scale == 0 and column.type.precision == 38
        fields.append(column.with_type(pa.int64()) if is_sum else column)
    return reader.cast(pa.schema(fields))


def _one_statement(query: str) -> str:
    if len(duckdb.extract_statements(query)) != 1:
        raise UsageError("QUERY must be one statement.")
    return query
