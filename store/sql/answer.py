"""The result of a query, batch by batch, in types that every program can read."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import duckdb
import pyarrow as pa

from ..errors import FuselineError, UsageError

Result = TypeVar("Result")
_SIGNAL_SECONDS = 0.2  # delay until a Ctrl-C is noticed: an endless wait may miss it


class Query:
    """Runs the steps of one query in a thread, so that Ctrl-C, which Python delivers to the main thread, can interrupt a step."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, *, causes: list[BaseException]) -> None:
        """`causes` collects the errors of scans of lazy tables, because DuckDB passes on only their text."""
        self.connection, self._causes = connection, causes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="query")

    def run(self, step: Callable[[], Result]) -> Result:
        """The result of a step.

        Raises:
            UsageError: DuckDB refuses the query.
            FuselineError: a scan failed.
            KeyboardInterrupt: the user ended it.
        """
        future = self._thread.submit(step)
        try:
            while True:
                try:
                    return future.result(_SIGNAL_SECONDS)
                except TimeoutError:
                    if future.done():
                        raise
        except KeyboardInterrupt:
            self.connection.interrupt()
            future.exception()  # waits until it has ended
            raise
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            cause = next((cause for cause in self._causes if isinstance(cause, FuselineError)), None)
            if cause is not None:
                raise cause from None
            if isinstance(error, FuselineError):
                raise
            if isinstance(error, duckdb.OutOfMemoryException):
                problem = f"The query needs more memory or temporary files than its limits allow ({_first_sentence(error)})."
                raise UsageError(problem, remedy="Raise --memory-limit or --spill-limit of `fuseline sql`.") from error
            raise UsageError(f"The query failed: {error}") from error

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


def _first_sentence(error: Exception) -> str:
    """DuckDB's message without its hints, which name settings that are locked here."""
    return str(error).split("\n")[0].strip().rstrip(".")


class Answer:
    """Batches of rows. DuckDB's 128-bit sums of integers become int64; repeated column names get a number."""

    def __init__(self, reader: pa.RecordBatchReader, *, query: Query) -> None:
        """Raises UsageError for a type that Arrow readers do not know."""
        self._reader, self._query = reader, query
        taken: set[str] = set()
        self.schema = pa.schema([_readable(column, taken=taken) for column in reader.schema])

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        while (batch := self._query.run(self._next)) is not None:
            yield batch

    def table(self) -> pa.Table:
        """The whole result."""
        return pa.Table.from_batches(self._query.run(lambda: list(iter(self._next, None))), self.schema)

    def _next(self) -> pa.RecordBatch | None:
        try:
            batch = self._reader.read_next_batch()
        except StopIteration:
            return None
        columns = [column.cast(field.type) for column, field in zip(batch.columns, self.schema, strict=True)]
        return pa.record_batch(columns, schema=self.schema)


def _readable(column: pa.Field, *, taken: set[str]) -> pa.Field:
    if _has_interval(column.type):
        raise UsageError(f"The column {column.name} is an interval. Select its seconds, epoch({column.name}), or CAST(… AS VARCHAR).")
    name = column.name
    number = 1
    while name in taken:
        name, number = f"{column.name}_{number}", number + 1
    taken.add(name)
    is_sum = pa.types.is_decimal128(column.type) and column.type.scale == 0 and column.type.precision == 38
    return pa.field(name, pa.int64() if is_sum else column.type)


def _has_interval(kind: pa.DataType) -> bool:
    if pa.types.is_nested(kind):
        return any(_has_interval(kind.field(index).type) for index in range(kind.num_fields))
    return pa.types.is_interval(kind)
