"""The input of the lazy tables: the current catalog, and the parts of datasets, which are opened once."""

import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import duckdb
import pyarrow as pa
from numpy.typing import NDArray

from ..dataset import Dataset
from ..errors import DamagedPart
from ..inside import is_plain_name
from ..layout import Layout
from ..part import PartArrays, Reads
from ..remedy import rebuild
from ..shown import shown
from ..tokenizer import token_texts
from .lazy_table import LABEL

_OPEN_PARTS = 256  # about 0.2 MB each
_PARAMETER = re.compile(r"\$(\w+)")
_DOCUMENTS = pa.schema([("corpus", LABEL), ("domain", LABEL), ("split", LABEL), ("part", pa.int32()), ("doc_id", pa.int64())])


class Documents:
    """The documents of a corpus, by id: ids count from 0 without gaps."""

    def __init__(self, table: pa.Table) -> None:
        assert not len(table) or table["doc_id"][-1].as_py() == len(table) - 1
        self.table = table
        self._labels = {name: table[name].combine_chunks() for name in ("domain", "split")}

    def labels(self, name: str, doc_ids: NDArray[Any]) -> pa.Array:
        """The domain or split of some documents."""
        return self._labels[name].take(pa.array(doc_ids))


class StoreReader:
    """What the lazy tables read from: the catalog as it is now, and parts, which are opened once."""

    def __init__(self, layout: Layout, connection: duckdb.DuckDBPyConnection) -> None:
        self.layout, self.reads = layout, Reads()
        self.connection = connection
        self._documents: dict[str, Documents] | None = None
        self._datasets: dict[tuple[str, str], Dataset] = {}
        self._parts: OrderedDict[tuple[str, str, int], PartArrays] = OrderedDict()
        self._texts: dict[str, pa.Array] = {}
        self._lock = Lock()  # two threads read

    def catalog_rows(self, query: str) -> list[dict[str, Any]]:
        """Rows of the catalog."""
        return self.connection.cursor().sql(query).pl().to_dicts()

    def catalog_arrays(self, query: str, parameters: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Columns of the catalog; parameters that the query does not name are ignored."""
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
            _require_name(name, root=self.layout.root)
            self._datasets[kind, name] = Dataset.open(self.layout.folder(kind, name))
        return self._datasets[kind, name]

    def arrays(self, kind: str, name: str, part: int) -> PartArrays:
        """The arrays of a part, opened once and kept open while the part is among the most recently used."""
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
            _require_name(digest, root=self.layout.root)
            texts = token_texts(self.layout.folder("tokenizers", digest))
            self._texts[digest] = pa.array([*texts, None], pa.string())
        return self._texts[digest]


def _require_name(name: str, *, root: Path) -> None:
    """Raise DamagedPart unless a name from the catalog is a valid name of a folder in the workspace."""
    if "/" in name or not is_plain_name(name):
        raise DamagedPart(f"The catalog names {shown(name)}, which is not a valid name of a dataset.", remedy=rebuild(root))
