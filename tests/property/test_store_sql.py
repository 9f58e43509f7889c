"""Whatever is asked of the lazy tables, the answer is that of looking at every row."""

import dataclasses
from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
from fuseline.store import arrays
from fuseline.store.sql import lazy_table
from fuseline.store.workspace import Workspace
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stores import DOMAINS, build_store

NUMBERS = {
    "positions": {"doc_id": (-1, 22), "segment": (0, 3), "part": (0, 4), "position": (0, 12), "token_id": (0, 45), "gold_id": (0, 45)},
    "distributions": {"doc_id": (-1, 22), "part": (0, 4), "rank": (0, 3), "token_id": (0, 45)},
    "alignments": {"doc_id": (-1, 22), "part": (0, 4), "source_position": (0, 12), "source_token_id": (0, 70_000)},
    "targets": {"doc_id": (-1, 22), "part": (0, 4), "position": (0, 12), "gold_id": (0, 45)},
}
FLOATS = {
    "positions": ["gold_logprob", "entropy", "tail_logprob"],
    "distributions": ["logprob"],
    "alignments": [],
    "targets": ["tail_logprob"],
}
TEXTS = {
    "positions": {"model": ["alpha", "beta", "gamma"], "domain": DOMAINS, "split": ["train", "test"], "corpus": ["first", "second"],
                  "gold_token": [" a3", "\\xe2", "<s>"]},
    "distributions": {"model": ["alpha", "beta"], "domain": DOMAINS, "corpus": ["first", "second"], "token": [" a3", "<s>"]},
    "alignments": {"source": ["beta-first", "alpha"], "target": ["alpha-first", "alpha"], "domain": DOMAINS,
                   "source_token": ["<s>", "\\xe2"]},
    "targets": {"name": ["fused-first", "fused-second"], "domain": DOMAINS, "source": ["alpha", "beta"], "token": [" a3"]},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Predicate:
    """A condition as SQL, and what it is for each row: (holds, is known). What is not known is NULL."""

    sql: str
    of: Callable[[pl.DataFrame], tuple[np.ndarray, np.ndarray]]


def _compared(name: str, sql: str, test: Callable[[np.ndarray], np.ndarray]) -> Predicate:
    def of(frame: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        known = frame[name].is_not_null().to_numpy()
        filled = frame[name].fill_null("" if frame[name].dtype == pl.String else 0).to_numpy()
        return test(filled) & known, known

    return Predicate(f"{name} {sql}", of)


def _literal(value: object) -> str:
    return f"'{value}'" if isinstance(value, str) else str(value)


OPERATORS = {"=": np.equal, "<>": np.not_equal, "<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}


@st.composite
def leaves(draw, table: str) -> Predicate:
    name = draw(st.sampled_from([*NUMBERS[table], *FLOATS[table], *TEXTS[table]]))
    if draw(st.integers(0, 5)) == 0:
        negated = draw(st.booleans())
        return Predicate(
            f"{name} IS {'NOT ' * negated}NULL",
            lambda frame: (frame[name].is_null().to_numpy() ^ negated, np.ones(len(frame), bool)),
        )
    if name in TEXTS[table]:
        values = st.sampled_from(TEXTS[table][name])
    elif name in FLOATS[table]:
        values = st.integers(-24, 12).map(lambda n: n / 2)
    else:
        values = st.integers(*NUMBERS[table][name])
    match draw(st.sampled_from(["compare", "in", "not in", "between"])):
        case "compare":
            operator, value = draw(st.sampled_from(sorted(OPERATORS))), draw(values)
            return _compared(name, f"{operator} {_literal(value)}", lambda x: OPERATORS[operator](x, value))
        case "between":
            low, high = draw(values), draw(values)
            return _compared(name, f"BETWEEN {_literal(low)} AND {_literal(high)}", lambda x: (x >= low) & (x <= high))
        case word:
            listed = draw(st.lists(values, min_size=1, max_size=4, unique=True))
            is_in = word == "in"
            return _compared(name, f"{word.upper()} ({', '.join(map(_literal, listed))})", lambda x: np.isin(x, np.array(listed)) == is_in)


def _and(left: Predicate, right: Predicate) -> Predicate:
    def of(frame: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        (a, a_known), (b, b_known) = left.of(frame), right.of(frame)
        is_false = (a_known & ~a) | (b_known & ~b)
        return a & b, (a_known & b_known) | is_false

    return Predicate(f"({left.sql} AND {right.sql})", of)


def _not(inner: Predicate) -> Predicate:
    def of(frame: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        holds, known = inner.of(frame)
        return known & ~holds, known

    return Predicate(f"(NOT {inner.sql})", of)


def _or(left: Predicate, right: Predicate) -> Predicate:
    both = _not(_and(_not(left), _not(right)))
    return Predicate(f"({left.sql} OR {right.sql})", both.of)


def predicates(table: str) -> st.SearchStrategy[Predicate]:
    """Trees of AND, OR and NOT."""
    return st.recursive(
        leaves(table),
        lambda inner: st.one_of(
            st.builds(_and, inner, inner), st.builds(_or, inner, inner), st.builds(_not, inner)
        ),
        max_leaves=5,
    )  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A workspace whose chunks and reads are so small that each part has many, and all its rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "CHUNK_ROWS", 8)
        patch.setattr(lazy_table, "CHUNK_ROWS", 8)
        patch.setattr(lazy_table, "_READ_BYTES", 1000)
        root = tmp_path_factory.mktemp("store")
        rows = build_store(root, seed=3, segment_tokens=24)
        workspace = Workspace.open(root)
        with workspace.database.connect():
            yield workspace, rows


@pytest.mark.parametrize("table", list(NUMBERS))
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_filter_finds_exactly_the_rows_that_satisfy_it(store: tuple[Workspace, dict[str, pl.DataFrame]], table: str, data):
    workspace, rows = store
    predicate = data.draw(predicates(table))
    columns = data.draw(st.lists(st.sampled_from(rows[table].columns), min_size=1, max_size=4, unique=True))
    holds, _ = predicate.of(rows[table])
    expected = rows[table].filter(pl.Series(holds, dtype=pl.Boolean)).select(columns)
    found = workspace.sql(f"SELECT {', '.join(columns)} FROM {table} WHERE {predicate.sql}")
    assert _sorted(found) == _sorted(expected)


def _sorted(frame: pl.DataFrame) -> list[str]:
    """Rows as texts: floats as stored, in float16, and parts in any order."""
    return sorted(repr(row) for row in frame.iter_rows())


@pytest.mark.parametrize("table", list(NUMBERS))
def test_without_a_filter_every_row_is_there_in_order(store, table):
    workspace, rows = store
    found = workspace.sql(f"SELECT * FROM {table}")
    assert found.columns == rows[table].columns
    assert _sorted(found) == _sorted(rows[table])
    keys = [name for name in ("part", "doc_id", "segment", "position", "rank") if name in found.columns]
    labels = [name for name in found.columns[:2] if name != "domain"]
    for _, group in found.group_by(*labels, "split"):
        assert group.select(keys).rows() == sorted(group.select(keys).rows())


def test_the_files_are_really_chunked(store):
    workspace, _ = store
    workspace.sql("SELECT entropy FROM positions WHERE doc_id = 3 AND model = 'alpha' AND corpus = 'first'")
    one = workspace.database.stats.chunks
    workspace.sql("SELECT entropy FROM positions")
    assert 0 < one < workspace.database.stats.chunks / 5
