"""The rows of a part's arrays as columns of a table.

Axes: T rows of a part's arrays (positions), K entries of a distribution, S segments of a part, R rows that one read gives. Position j of a
segment predicts token j + 1.
"""

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..errors import DamagedPart
from ..part import PartArrays
from ..remedy import rebuild
from .lazy_table import TableContent
from .store_reader import StoreReader

MOST_SEGMENT_ROWS = 1 << 24  # tokens; no model's context is longer
Maker = Callable[["Rows"], pa.Array]


class Rows:
    """The rows of some segments of a part; each array is read when a column needs it."""

    def __init__(self, part: "Part", segments: NDArray[np.int64]) -> None:
        self.part, self.segments = part, segments
        self.lengths_S = part.n_rows_S[segments]
        starts_S = part.starts_S[segments]
        self._first, self._stop = int(starts_S[0]), int(starts_S[-1] + self.lengths_S[-1])
        before_R = np.repeat(np.cumsum(self.lengths_S) - self.lengths_S, self.lengths_S)
        self.position_R: NDArray[np.int64] = np.arange(self.lengths_S.sum()) - before_R  # index of each row in its segment
        is_dense = self._stop - self._first == len(self.position_R)
        self._place_R = None if is_dense else np.repeat(starts_S - self._first, self.lengths_S) + self.position_R

    @cached_property
    def arrays(self) -> PartArrays:
        """The part's arrays."""
        return self.part.store.arrays(self.part.kind, self.part.name, self.part.index)

    def array(self, name: str, *, of: PartArrays | None = None) -> NDArray[Any]:
        """An array over positions, at these rows; `of` is another dataset's part with the same positions."""
        found = (of or self.arrays).read(name, self._first, self._stop)
        return found if self._place_R is None else found[self._place_R]

    def repeated(self, values_S: NDArray[Any]) -> NDArray[Any]:
        """A value per segment of the part, at these rows."""
        return np.repeat(values_S[self.segments], self.lengths_S)

    @cached_property
    def token_ids_R(self) -> NDArray[Any]:
        """The token at each position."""
        return self.array("token_ids_T")

    @cached_property
    def is_last_R(self) -> NDArray[np.bool_]:
        """Whether the position is the last of its segment."""
        is_last_R = np.zeros(len(self.position_R), np.bool_)
        is_last_R[np.cumsum(self.lengths_S) - 1] = True
        return is_last_R

    @cached_property
    def gold_ids_R(self) -> NDArray[Any]:
        """The token after each position; undefined at the last of a segment."""
        return np.append(self.token_ids_R[1:], self.token_ids_R[:1])

    @cached_property
    def topk_ids_RK(self) -> NDArray[Any]:
        """Token ids of each position's distribution."""
        return self.array("topk_ids_TK")

    @cached_property
    def topk_logprobs_RK(self) -> NDArray[np.float32]:
        """Log-probabilities of each position's distribution; -inf for missing entries."""
        return self.array("topk_logprobs_TK").astype(np.float32)

    @property
    def has_distributions(self) -> bool:
        """Whether distributions are stored, and not only the likelihood of the next token."""
        return "topk_ids_TK" in self.arrays.names

    def nulls(self, kind: pa.DataType) -> pa.Array:
        """A column of nulls."""
        return pa.nulls(len(self.position_R), kind)

    def texts(self, ids: NDArray[Any], *, tokenizer: str | None = None) -> pa.Array:
        """The texts of tokens."""
        vocabulary = self.part.store.token_texts(tokenizer or self.part.tokenizer)
        return vocabulary.take(pa.array(np.minimum(ids, len(vocabulary) - 1)))  # the last is null, for ids that the tokenizer does not know


def id_column(ids: NDArray[Any], *, mask: NDArray[np.bool_] | None = None) -> pa.Array:
    return pa.array(ids.astype(np.uint32), mask=mask)


def _floats(values: NDArray[Any]) -> pa.Array:
    values = values.astype(np.float32)  # DuckDB reads no float16
    return pa.array(values, mask=np.isnan(values))


def _gold_token(rows: Rows) -> pa.Array:
    return pc.if_else(pa.array(rows.is_last_R), pa.scalar(None, pa.string()), rows.texts(rows.gold_ids_R))


def _stored(name: str) -> Maker:
    """A column from an array of log-probabilities or similar values; null if the dataset does not store it."""
    return lambda rows: _floats(rows.array(name)) if name in rows.arrays.names else rows.nulls(pa.float32())


def _is_label(rows: Rows) -> pa.Array:
    """Whether the next token is trained on and scored: in conversations the assistant's tokens, in plain text every next token."""
    if "label_mask_T" in rows.arrays.names:
        return pa.array(rows.array("label_mask_T").astype(np.bool_))
    return pa.array(~rows.is_last_R)


def _lists(values: Callable[[Rows, NDArray[np.bool_]], pa.Array], kind: pa.DataType) -> Maker:
    """A list per position of its distribution's entries; entries without mass are left out."""

    def make(rows: Rows) -> pa.Array:
        if not rows.has_distributions:
            return rows.nulls(kind)
        used_RK = np.isfinite(rows.topk_logprobs_RK)
        offsets = np.concatenate([[0], np.cumsum(used_RK.sum(axis=1))]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), values(rows, used_RK))

    return make


MAKERS: dict[str, Maker] = {
    "segment": lambda rows: pa.array(rows.repeated(rows.part.segment_S).astype(np.int32)),
    "doc_id": lambda rows: pa.array(rows.repeated(rows.part.doc_id_S)),
    "position": lambda rows: pa.array(rows.position_R.astype(np.int32)),
    "token_id": lambda rows: id_column(rows.token_ids_R),
    "token": lambda rows: rows.texts(rows.token_ids_R),
    "gold_id": lambda rows: id_column(rows.gold_ids_R, mask=rows.is_last_R),
    "gold_token": _gold_token,
    "gold_logprob": _stored("gold_logprob_T"),
    "is_label": _is_label,
    "tail_logprob": _stored("tail_logprob_T"),
    "entropy": _stored("entropy_T"),
    "topk_ids": _lists(lambda rows, used_RK: id_column(rows.topk_ids_RK[used_RK]), pa.list_(pa.uint32())),
    "topk_tokens": _lists(lambda rows, used_RK: rows.texts(rows.topk_ids_RK[used_RK]), pa.list_(pa.string())),
    "topk_logprobs": _lists(lambda rows, used_RK: pa.array(rows.topk_logprobs_RK[used_RK]), pa.list_(pa.float32())),
}


class Part:
    """One part of a dataset, as listed in the catalog. Implements `PartRows`."""

    rows_class = Rows
    makers = MAKERS

    def __init__(self, content: TableContent, *, store: StoreReader, row: dict[str, Any], segments: dict[str, NDArray[Any]]) -> None:
        self.store, self._content = store, content
        self.kind, self.name, self.index, self.row = row["kind"], row["name"], row["part"], row
        self.tokenizer: str = row["tokenizer"]
        self.doc_id_S: NDArray[np.int64] = segments["doc_id"]
        self.segment_S: NDArray[np.int64] = segments["segment"]
        self.n_rows_S = segments["n_rows"].astype(np.int64)
        if len(self.n_rows_S) and not 0 <= self.n_rows_S.min() <= self.n_rows_S.max() <= MOST_SEGMENT_ROWS:
            problem = f"The catalog gives a segment of {self.kind}/{self.name} {self.n_rows_S.max():,} positions, more than the limit."
            raise DamagedPart(problem, remedy=rebuild(self.store.layout.root))
        self.starts_S = np.cumsum(self.n_rows_S) - self.n_rows_S
        self.facts = segments

    def labels(self) -> dict[str, pa.Array]:
        """The columns that are constant per segment, [S]."""
        documents = self.store.documents(self.row["corpus"])
        found: dict[str, pa.Array] = {"doc_id": pa.array(self.doc_id_S), "segment": pa.array(self.segment_S.astype(np.int32))}
        for name in self._content.segment_columns:
            if name in ("domain", "split"):
                found[name] = documents.labels(name, self.doc_id_S)
            elif name not in found:
                found[name] = pa.array([self.row[name]] * len(self.doc_id_S), self._content.schema.field(name).type)
        return found

    def row_bytes(self, names: Iterable[str]) -> int:
        """About how many bytes the named columns take per row."""
        return sum(12 * self.top_k if name.startswith("topk_") else 8 for name in names)

    @property
    def top_k(self) -> int:
        """Number of entries of each distribution of the dataset."""
        return int(self.store.dataset(self.kind, self.name).identity["top_k"])

    def columns(self, names: Iterable[str], *, segments: NDArray[np.int64]) -> dict[str, pa.Array]:
        """The named columns of the rows of some segments."""
        rows = self.rows_class(self, segments)
        return {name: self._column(rows, name) for name in names}

    def _column(self, rows: Rows, name: str) -> pa.Array:
        maker = self.makers.get(name)
        if maker is not None:
            return maker(rows)
        if name in ("domain", "split"):
            return self.store.documents(self.row["corpus"]).labels(name, rows.repeated(self.doc_id_S))
        return _constant(self.row[name], self._content.schema.field(name).type, len(rows.position_R))


def _constant(value: Any, kind: pa.DataType, n: int) -> pa.Array:
    if pa.types.is_dictionary(kind):
        return pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([value], pa.string()))
    return pa.array(np.full(n, value), kind)
