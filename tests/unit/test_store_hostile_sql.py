"""SQL that writes, catalogs that a stranger has filled, results written where they must not be: refused, and nothing is changed."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import duckdb
import pytest
from fuseline.commands.prompt import _history
from fuseline.store import catalog, catalog_file, durable
from fuseline.store.catalog_file import MEMORY_LIMIT, ForeignCatalog, Limits
from fuseline.store.errors import FuselineError, UsageError
from fuseline.store.sql.database import Database
from fuseline.store.verify import verify
from fuseline.store.workspace import Workspace
from support.stores import build_store

LARGE = (
    "SELECT len(list(text ORDER BY h)) AS n FROM (SELECT range::VARCHAR || repeat('x', 40) AS text, hash(range) AS h FROM range(1000000))"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "workspace"
    build_store(folder, seed=5)
    return folder


@pytest.fixture(scope="module")
def reader(made) -> Workspace:
    """For tests that change nothing, or must not be able to."""
    return Workspace.open(made)


@pytest.fixture
def workspace(made, tmp_path) -> Workspace:
    return Workspace.open(Path(shutil.copytree(made, tmp_path / "workspace")))


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


OWN = ["catalog.duckdb", "catalog.duckdb.wal"]
WRITING = [
    "COPY (SELECT 1) TO '{file}'",
    "COPY (SELECT 'x'::BLOB) TO '{file}' (FORMAT blob)",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{file}'",
    "EXPLAIN (ANALYZE) COPY (SELECT 1) TO '{file}'",
    "explain /* ( */ analyze -- (\n copy (SELECT 1) TO '{file}'",
    "WITH a AS (COPY (SELECT 1) TO '{file}') FROM a",
    "with a as not materialized (/* x */ cOpY (SELECT 1) TO '{file}') SELECT * FROM a",
    "EXPLAIN ANALYZE WITH a AS (COPY (SELECT 1) TO '{file}') FROM a",
    "WITH a AS (COPY (SELECT 1) TO '{file}') PIVOT a ON Count USING sum(Count)",
    "FROM json_execute_serialized_sql(json_serialize_sql('WITH a AS (COPY (SELECT 1) TO ''{file}'') FROM a'))",
    "FROM query('FROM json_execute_serialized_sql(json_serialize_sql(''WITH a AS (COPY (SELECT 1) TO ''''{file}'''') FROM a''))')",
    "EXPORT DATABASE '{file}'",
]


@pytest.mark.parametrize("query", WRITING)
def test_no_statement_writes_a_file_of_the_workspace(reader, query):
    workspace, before = reader, contents(reader.root)
    for name in OWN:
        for external_access in (False, True):
            with pytest.raises(UsageError):
                Database(workspace, external_access=external_access).sql(query.format(file=workspace.root / name))
    assert contents(workspace.root) == before


@pytest.mark.parametrize(
    "query",
    [
        "SET VARIABLE a = 1",
        "SET threads = 1",
        "RESET threads",
        "PRAGMA version",
        "CALL pragma_version()",
        "ATTACH ':memory:' AS m",
        "USE m",
        "INSTALL httpfs",
        "LOAD httpfs",
        "PREPARE p AS SELECT 1",
        "EXECUTE p",
        "BEGIN",
        "CHECKPOINT",
        "CREATE TEMP TABLE t (a INTEGER)",
        "CREATE TEMP MACRO f(x) AS x",
        "COMMENT ON TABLE segments IS 'x'",
        "VACUUM",
        "UPDATE EXTENSIONS",
        "IMPORT DATABASE 'x'",
        "COPY FROM DATABASE a TO b",
        "WITH a AS (DELETE FROM segments RETURNING *) FROM a",
        "COPY segments FROM 'x'",
        "DETACH m",
        "EXPLAIN CREATE TEMP TABLE t (a INTEGER)",
        "EXPLAIN ANALYZE",
    ],
)
def test_only_statements_that_read_run(reader, query):
    with pytest.raises(UsageError, match=r"Only statements that read|query failed"):
        reader.sql(query)


@pytest.mark.parametrize(
    "query",
    [
        "SELECT 1 AS a",
        "FROM segments LIMIT 1",
        "WITH a AS (SELECT 1 AS x) FROM a",
        "VALUES (1)",
        "DESCRIBE segments",
        "SUMMARIZE segments",
        "SHOW TABLES",
        "EXPLAIN SELECT 1",
        "EXPLAIN ANALYZE SELECT 1",
        "EXPLAIN (FORMAT json) SELECT 1",
        "EXPLAIN (SELECT 1)",
        "TABLE segments",
        "PIVOT segments ON kind USING sum(n_bytes) GROUP BY model",
        "FROM (PIVOT segments ON kind USING sum(n_bytes) GROUP BY model)",
        "SELECT 'COPY (SELECT 1) TO ''x''' AS query, '\"type\":\"COPY_QUERY_NODE\"' AS \"with\"",
        "WITH RECURSIVE a AS (SELECT 1 AS x UNION ALL SELECT x + 1 FROM a WHERE x < 5) FROM a",
        "SELECT count(*) AS copy, sum(part) AS query FROM parts",
    ],
)
def test_whatever_reads_is_run(reader, query):
    assert len(reader.sql(query)) > 0


def test_with_external_access_results_are_copied_anywhere_but_into_a_workspace(workspace, tmp_path):
    database = Database(workspace, external_access=True)
    database.sql(f"COPY (SELECT 1 AS \"to\", '(' AS b) TO '{tmp_path}/it''s.csv' (HEADER)")
    assert (tmp_path / "it's.csv").read_text().splitlines()[0] == "to,b"
    other = Workspace.create(tmp_path / "other")
    (tmp_path / "link").symlink_to(other.root)
    before = contents(tmp_path)
    for target in (
        f"'{other.root}/new.csv'",
        f"'{tmp_path}/link/new.csv'",
        f"'{tmp_path}/link/../other/workspace.json'",
        f"('{tmp_path}/o' || 'ther/x')",
        f"'{tmp_path}' (FORMAT parquet, PARTITION_BY (a), OVERWRITE)",
        f"e'{tmp_path}/oth\\x65r/x'",
        f"$${other.root}/x$$",
        "getvariable('x')",
    ):
        with pytest.raises(UsageError, match="COPY"):
            database.sql(f"COPY (SELECT 1 AS a, 2 AS b) TO {target}")
    assert contents(tmp_path) == before


# Catalogs


def foreign(path: Path, statements: str) -> None:
    with duckdb.connect(path) as connection:
        connection.execute(statements.format(secret=path.parent.parent / "secret.csv"))


FOREIGN = [
    "DROP TABLE datasets; CREATE VIEW datasets AS SELECT content AS kind, 'a' AS name, 'b' AS fingerprint FROM read_text('{secret}')",
    "CREATE MACRO avg(x) AS 42",
    "CREATE MACRO duckdb_tables() AS TABLE SELECT 'main' AS schema_name, 'x' AS table_name, 'y' AS sql, false AS internal",
    "CREATE SCHEMA other; CREATE TABLE other.segments AS FROM segments",
    "CREATE TYPE mood AS ENUM ('a')",
    "CREATE INDEX i ON segments (model)",
    "ALTER TABLE segments ADD COLUMN more INTEGER",
    "ALTER TABLE segments ALTER nll SET DEFAULT 42",
    "DROP TABLE migrations; CREATE VIEW migrations AS SELECT 1 FROM range(4)",
    "DROP TABLE migrations",
]


@pytest.mark.parametrize("statements", FOREIGN)
def test_a_catalog_with_other_objects_is_never_asked_and_made_again(workspace, tmp_path, statements):
    (tmp_path / "secret.csv").write_text("secret")
    expected = workspace.sql("SELECT avg(n_bytes) AS a, count(*) AS n FROM segments").rows()
    foreign(workspace.catalog_path, statements)
    for read in (lambda: workspace.sql("FROM datasets"), lambda: catalog.known_parts(workspace)):
        with pytest.raises(FuselineError, match="store rebuild"):
            read()
    assert [finding.path for finding in verify(workspace).findings if finding.path == workspace.catalog_path]
    catalog.fold(workspace)
    assert workspace.sql("SELECT avg(n_bytes) AS a, count(*) AS n FROM segments").rows() == expected
    assert b"secret" not in workspace.catalog_path.read_bytes()


@pytest.mark.parametrize(("suffix", "kind"), [("", "link"), ("", "pipe"), (".wal", "broken link"), (".wal", "folder"), (".tmp", "link")])
def test_whatever_lies_where_duckdb_keeps_its_files_a_run_makes_the_catalog_again(workspace, tmp_path, suffix, kind):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    path = Path(f"{workspace.catalog_path}{suffix}")
    durable.remove(path)
    if kind == "folder":
        (path / "deep").mkdir(parents=True)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(outside / ("file" if kind == "link" else "nothing"))
    if suffix != ".tmp":
        with pytest.raises(ForeignCatalog, match="must be a regular file"):
            workspace.sql("SELECT 1")
    catalog.fold(workspace)
    assert workspace.sql("SELECT count(*) AS n FROM segments")["n"].item() > 0
    assert [(path.name, path.read_text()) for path in outside.iterdir()] == [("file", "mine")]


def test_the_names_in_a_catalog_lead_nowhere_else(workspace, tmp_path):
    shutil.copytree(workspace.root / "distributions" / "alpha-first", tmp_path / "elsewhere")
    with duckdb.connect(workspace.catalog_path) as connection:
        for table in ("datasets", "parts", "segments"):
            connection.execute(f"UPDATE {table} SET name = '../../../elsewhere' WHERE name = 'alpha-first'")
    with pytest.raises(FuselineError, match=r"'\.\./\.\./\.\./elsewhere', which is not a valid name"):
        workspace.sql("SELECT sum(entropy) FROM positions WHERE corpus = 'first' AND model = 'alpha'")


# Limits


def test_a_query_takes_no_more_memory_and_room_than_allowed_and_leaves_nothing(workspace):
    with pytest.raises(UsageError, match=r"Raise --memory-limit or --spill-limit of `fuseline sql`\.$") as raised:
        Database(workspace, memory_limit=60_000_000, spill_limit=1_000_000).sql(LARGE)
    assert "SET " not in str(raised.value)
    assert "\n" not in str(raised.value)
    assert Database(workspace).sql(LARGE)["n"].item() == 1_000_000
    folder = catalog_file._spill_folder()
    assert folder is not None
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not any(path.is_file() for path in folder.rglob("*"))
    assert not Path(f"{workspace.catalog_path}.tmp").exists()


def test_a_limit_that_is_given_counts_even_where_it_is_the_usual_one(monkeypatch):
    monkeypatch.setattr(catalog_file.psutil, "virtual_memory", lambda: SimpleNamespace(total=2 << 30))
    assert Limits().config(spill_folder=None)["memory_limit"] == f"{1 << 30}B"
    assert Limits(memory=MEMORY_LIMIT).config(spill_folder=None)["memory_limit"] == f"{MEMORY_LIMIT}B"


def test_limits_are_options_of_the_command(workspace, tmp_path):
    def ask(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "fuseline", "sql", "-w", str(workspace.root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": str(tmp_path)})

    result = ask("--memory-limit", "60MB", "--spill-limit", "1MB", LARGE)
    assert result.returncode == 2
    assert "--spill-limit" in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["workspace"]
    assert "must be a size" in ask("--memory-limit", "lots", "SELECT 1").stderr


# Files that users name


@pytest.fixture
def write(workspace):
    def write(path: Path) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "fuseline", "sql", "-w", str(workspace.root), "SELECT 1 AS a", "-o", str(path), "--format", "csv"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return write


def test_results_are_not_written_into_a_workspace(workspace, write, tmp_path):
    Workspace.create(tmp_path / "other")
    (tmp_path / "link.csv").symlink_to(workspace.catalog_path)
    before = contents(tmp_path)
    for path in (workspace.catalog_path, workspace.root / "corpus" / "new.csv", tmp_path / "other" / "new.csv", tmp_path / "link.csv"):
        result = write(path)
        assert result.returncode == 2
        assert "lies in the workspace" in result.stderr
    assert contents(tmp_path) == before


def test_a_file_that_is_replaced_keeps_its_mode_and_a_link_is_followed(write, tmp_path):
    private = tmp_path / "private.csv"
    private.touch(0o600)
    (tmp_path / "link.csv").symlink_to(private)
    assert write(tmp_path / "link.csv").returncode == 0
    assert (tmp_path / "link.csv").is_symlink()
    assert private.read_text() == "a\n1\n"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    os.umask(0o022)
    assert write(tmp_path / "new.csv").returncode == 0
    assert stat.S_IMODE((tmp_path / "new.csv").stat().st_mode) == 0o644


def test_what_was_asked_is_kept_for_its_owner_alone(tmp_path):
    path = tmp_path / "state" / "sql_history"
    _history(path)
    assert (stat.S_IMODE(path.parent.stat().st_mode), stat.S_IMODE(path.stat().st_mode)) == (0o700, 0o600)
    path.chmod(0o644)
    path.parent.chmod(0o755)
    _history(path)
    assert (stat.S_IMODE(path.parent.stat().st_mode), stat.S_IMODE(path.stat().st_mode)) == (0o700, 0o600)
