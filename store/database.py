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
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import duckdb
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from . import catalog
from .answer import Answer, Query
from .catalog_file import SPILL_LIMIT, Limits
from .dataset import Dataset
from .errors import DamagedPart
from .inside import is_plain_name
from .lazy_table import LABEL, LazyTable, ScanStats
from .parquet_tables import PARQUET_TABLES
from .part import PartArrays, Reads
from .remedy import rebuild
from .shown import shown
from .statement import Statement, checked, require_no_writing
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
            _require_name(name, root=self.workspace.root)
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
            _require_name(digest, root=self.workspace.root)
            texts = token_texts(self.workspace.folder("tokenizers", digest))
            self._texts[digest] = pa.array([*texts, None], pa.string())
        return self._texts[digest]


def _require_name(name: str, *, root: Path) -> None:
    """Raise DamagedPart unless a name from the catalog can be the name of a folder in the workspace."""
    if "/" in name or not is_plain_name(name):
        raise DamagedPart(f"The catalog names {shown(name)}, which is no name of a dataset.", remedy=rebuild(root))


_DOCUMENTS = pa.schema([("corpus", LABEL), ("domain", LABEL), ("split", LABEL), ("part", pa.int32()), ("doc_id", pa.int64())])


class Database:
    """SQL over a workspace. Between two queries nothing is held, so that a run going on can bring the catalog up to date."""

    def __init__(
        self, workspace: "Workspace", *, external_access: bool = False, memory_limit: int | None = None, spill_limit: int = SPILL_LIMIT
    ) -> None:
        """Ask a workspace.

        Args:
            workspace: what is asked.
            external_access: queries may read and write files that are not the workspace's.
            memory_limit: bytes of memory that DuckDB takes for a query; by default at most half of the machine's.
            spill_limit: bytes that a query which needs more may write to temporary files.
        """
        self.workspace, self._external_access = workspace, external_access
        self._limits = Limits(memory=memory_limit, spill=spill_limit)
        self.stats = QueryStats()  # of the last query
        self._store: Store | None = None
        self._version: tuple[int, ...] | None = None
        self._users = 0  # of the connection that `_held` keeps open
        self._is_asked = False  # whether a query is under way on it
        self._told = _Told()
        self._held = ExitStack()
        self._lock = Lock()

    def sql(self, query: str, parameters: Parameters = None) -> pl.DataFrame:
        """The result of a query as a table; empty for a statement that has none.

        Raises:
            UsageError: the query is wrong.
            DataError: there is no catalog yet.
            DamagedPart: what it needs is damaged.
        """
        with self.stream(query, parameters) as answer:
            return pl.DataFrame() if answer is None else pl.DataFrame(pl.from_arrow(answer.table()))

    def tables(self) -> dict[str, list[str]]:
        """All tables and their columns."""
        query = "SELECT table_name, list(column_name ORDER BY column_index) FROM duckdb_columns() WHERE NOT internal GROUP BY ALL"
        return dict(sorted(row for row in self.sql(query).iter_rows() if row[0] != "migrations"))

    @contextmanager
    def stream(self, query: str, parameters: Parameters = None) -> Iterator[Answer | None]:
        """The result of a query batch by batch; None for a statement that has none. See `sql` for the errors."""
        statement = checked(query, external_access=self._external_access, workspace=self.workspace.root)
        stats = QueryStats()
        with self._hold() as store, self._free_connection(store) as (connection, told):
            told.scans, told.causes, self.stats = stats.scans, [], stats
            before, started = (store.reads.chunks, store.reads.stored_bytes), time.perf_counter()
            with closing(Query(connection, causes=told.causes)) as running:
                try:
                    reader = running.run(lambda: _begun(connection, statement, parameters))
                    with nullcontext() if reader is None else closing(reader):  # what is not read to its end would keep the catalog open
                        yield None if reader is None else Answer(reader, query=running)
                finally:
                    stats.seconds = time.perf_counter() - started
                    stats.chunks, stats.stored_bytes = store.reads.chunks - before[0], store.reads.stored_bytes - before[1]

    @contextmanager
    def connect(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection that has all tables, for many queries: opening one takes DuckDB longer than a small query.

        In the `with` block `sql` and `stream` use it too. While it is open, no run can bring the catalog up to date.
        """
        with self._hold() as store:
            yield store.connection

    @contextmanager
    def _hold(self) -> Iterator[Store]:
        """Keep the catalog open; what was read of the workspace before is kept, unless the catalog has changed since."""
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

    def _open(self) -> Store:
        connection = self._held.enter_context(catalog.reading(self.workspace, limits=self._limits, external_access=self._external_access))
        facts = self.workspace.catalog_path.stat()
        version = (facts.st_ino, facts.st_mtime_ns, facts.st_size)
        if self._store is None or version != self._version:
            self._store, self._version = Store(self.workspace, connection), version
        self._store.connection = connection
        _register(connection, self._store, told=self._told)
        return self._store

    @contextmanager
    def _free_connection(self, store: Store) -> Iterator[tuple[duckdb.DuckDBPyConnection, "_Told"]]:
        """The one connection, or a cursor of it while another query is under way; and what its tables tell of the query."""
        with self._lock:
            is_free, self._is_asked = not self._is_asked, True
        if not is_free:
            with store.connection.cursor() as cursor:
                told = _Told()
                _register(cursor, store, told=told)  # 3 ms
                yield cursor, told
            return
        try:
            yield store.connection, self._told
        finally:
            self._is_asked = False


class _Told:
    """What the lazy tables of a connection tell of its query."""

    def __init__(self) -> None:
        self.scans: list[ScanStats] = []
        self.causes: list[BaseException] = []

    def on_scan(self, scan: ScanStats) -> None:
        """A table is scanned."""
        self.scans.append(scan)

    def on_error(self, cause: BaseException) -> None:
        """A scan failed."""
        self.causes.append(cause)


def _register(connection: duckdb.DuckDBPyConnection, store: Store, *, told: _Told) -> None:
    for source in store.sources:
        connection.register(source.name, LazyTable(source, on_scan=told.on_scan, on_error=told.on_error))
    for table in PARQUET_TABLES:
        connection.register(table.name, table(store, on_scan=told.on_scan, on_error=told.on_error))


def _begun(connection: duckdb.DuckDBPyConnection, statement: Statement, parameters: Parameters) -> pa.RecordBatchReader | None:
    require_no_writing(connection, statement)
    relation = connection.sql(statement.text, params=parameters)
    return None if relation is None else relation.to_arrow_reader(_BATCH_ROWS)
