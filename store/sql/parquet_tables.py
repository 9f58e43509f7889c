"""The lazy tables over stored Parquet parts: `texts` (the corpora's segments), `vocab_map_entries` and `token_matches`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from pyarrow.fs import LocalFileSystem

from .lazy_table import ScanStats
from .store_reader import StoreReader

_FORMAT, _DISK = pads.ParquetFileFormat(), LocalFileSystem()
_PartKey = tuple[str, int]  # name of the dataset, part


class ParquetTable(pads.Dataset):
    """All parts of one kind of dataset as one table. Parts that cannot match are not opened; the others are verified first."""

    name: str
    kind: str
    columns: pa.Schema

    def __init__(self, store: StoreReader, *, on_scan: Callable[[ScanStats], None], on_error: Callable[[BaseException], None]) -> None:
        """`on_scan` receives each scan; `on_error` each error of a scan, because DuckDB passes on only its text."""
        self.store, self._on_scan, self._on_error = store, on_scan, on_error

    def known(self) -> Iterator[tuple[_PartKey, pc.Expression, pc.Expression]]:
        """Each part, with the values of columns that it does not store, and with a filter that its rows satisfy."""
        raise NotImplementedError

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns."""
        return self.columns

    def scanner(self, columns: Sequence[str] | None = None, filter: pc.Expression | None = None, **_: Any) -> pads.Scanner:  # noqa: A002
        """Begin a scan; called by DuckDB."""
        stats = ScanStats(table=self.name, columns=list(columns or self.schema.names), filter=None if filter is None else str(filter))
        self._on_scan(stats)
        try:
            chosen = self._chosen(filter)
            stats.parts = len(chosen)
            fragments = [_fragment(self.store.dataset(self.kind, name).table_path(part), given) for (name, part), given in chosen]
        except Exception as error:
            self._on_error(error)
            raise
        return self._over(fragments).scanner(columns=columns, filter=filter)

    def _chosen(self, wanted: pc.Expression | None) -> list[tuple[_PartKey, pc.Expression]]:
        """The parts that may match the filter."""
        parts = [(key, given, given & others) for key, given, others in self.known()]
        fragments = [_fragment(index, everything) for index, (_, _, everything) in enumerate(parts)]
        return [parts[int(fragment.path)][:2] for fragment in self._over(fragments).get_fragments(filter=wanted)]

    def _over(self, fragments: list[Any]) -> pads.FileSystemDataset:
        return pads.FileSystemDataset(fragments, self.schema, _FORMAT, filesystem=_DISK)


def _fragment(path: object, known: pc.Expression) -> Any:
    return _FORMAT.make_fragment(str(path), filesystem=_DISK, partition_expression=known)


class Texts(ParquetTable):
    """A row per segment of every corpus."""

    name, kind = "texts", "corpus"
    columns = pa.schema(
        [
            ("corpus", pa.string()), ("domain", pa.string()), ("split", pa.string()), ("part", pa.int32()), ("doc_id", pa.int64()),
            ("segment", pa.int32()), ("text", pa.string()),
        ]
    )  # fmt: skip

    def known(self) -> Iterator[tuple[_PartKey, pc.Expression, pc.Expression]]:
        """The corpus and the part; the range of documents."""
        query = """
            SELECT p.name, p.part, min(doc_id) AS first, max(doc_id) AS last
            FROM parts p JOIN documents d ON (d.corpus, d.part) = (p.name, p.part)
            WHERE kind = 'corpus' GROUP BY ALL ORDER BY ALL"""
        for row in self.store.catalog_rows(query):
            given = (pc.field("corpus") == row["name"]) & (pc.field("part") == pa.scalar(row["part"], pa.int32()))
            doc_id = pc.field("doc_id")
            yield (row["name"], row["part"]), given, (doc_id >= row["first"]) & (doc_id <= row["last"])


class VocabMapEntries(ParquetTable):
    """A row per source token of every vocabulary map; `target_id` is null for unmapped tokens."""

    name, kind = "vocab_map_entries", "vocab_maps"
    columns = pa.schema(
        [
            ("name", pa.string()), ("source_id", pa.uint32()), ("target_id", pa.uint32()), ("rule", pa.string()),
            ("distance", pa.uint32()), ("count", pa.uint64()), ("source_bytes", pa.binary()), ("target_bytes", pa.binary()),
        ]
    )  # fmt: skip

    def known(self) -> Iterator[tuple[_PartKey, pc.Expression, pc.Expression]]:
        """The name of the map."""
        for row in self.store.catalog_rows("SELECT name, part FROM parts WHERE kind = 'vocab_maps' ORDER BY ALL"):
            yield (row["name"], row["part"]), pc.field("name") == row["name"], pc.scalar(True)


class TokenMatches(ParquetTable):
    """A row per pair of tokens that a position map matches in a part of the corpus, with the number of matches."""

    name, kind = "token_matches", "token_matches"
    columns = pa.schema(
        [("name", pa.string()), ("part", pa.int32()), ("source_id", pa.uint32()), ("target_id", pa.uint32()), ("count", pa.uint64())]
    )

    def known(self) -> Iterator[tuple[_PartKey, pc.Expression, pc.Expression]]:
        """The name of the matches and the part."""
        for row in self.store.catalog_rows("SELECT name, part FROM parts WHERE kind = 'token_matches' ORDER BY ALL"):
            given = (pc.field("name") == row["name"]) & (pc.field("part") == pa.scalar(row["part"], pa.int32()))
            yield (row["name"], row["part"]), given, pc.scalar(True)


PARQUET_TABLES = (Texts, VocabMapEntries, TokenMatches)
