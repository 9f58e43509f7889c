"""SQL over a workspace: what may be asked, what is read for it, and what is said when something is wrong."""

import json
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl
import pytest
from fuseline.store import catalog
from fuseline.store.errors import DamagedPart, DataError, UsageError, WorkspaceBusy
from fuseline.store.sql.database import Database
from fuseline.store.workspace import Workspace
from support.small import small_workspace
from support.stores import build_store


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "workspace"
    build_store(folder, seed=5)
    return folder


@pytest.fixture
def workspace(root) -> Workspace:
    return Workspace.open(root)


def fuseline(root: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fuseline", "sql", "-w", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, input=stdin)


FORBIDDEN = [
    "CREATE TABLE mine (a INTEGER)",
    "DELETE FROM segments",
    "UPDATE documents SET domain = 'x'",
    "INSERT INTO positions VALUES (1)",
    "DROP TABLE segments",
    "COPY (SELECT 1) TO '{outside}'",
    "SELECT * FROM read_csv('{outside}')",
    "SELECT * FROM '{outside}'",
    "ATTACH '{outside}' AS other",
    "EXPORT DATABASE '{outside}'",
    "SET enable_external_access = true",
    "LOAD httpfs",
    "SELECT * FROM workspace",  # a variable of the caller's
    "SELECT 1; SELECT 2",
    "",
    "SELEC 1",
]


@pytest.mark.parametrize("query", FORBIDDEN)
def test_nothing_is_changed_and_nothing_outside_is_touched(workspace, tmp_path, query):
    outside = tmp_path / "outside.csv"
    outside.write_text("secret\n1\n")
    before = {path: path.read_bytes() for path in workspace.root.rglob("*") if path.is_file()}
    with pytest.raises(UsageError):
        workspace.sql(query.format(outside=outside))
    assert {path: path.read_bytes() for path in workspace.root.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["outside.csv"]
    assert outside.read_text() == "secret\n1\n"


def test_other_files_are_read_when_that_is_asked_for_by_name(workspace, tmp_path):
    (tmp_path / "mine.csv").write_text("number\n41\n")
    query = f"SELECT number + 1 AS n FROM read_csv('{tmp_path}/mine.csv')"
    assert Database(workspace, external_access=True).sql(query)["n"].to_list() == [42]
    assert fuseline(workspace.root, query).returncode == 2
    assert "42" in fuseline(workspace.root, "--external-access", query).stdout


def test_only_the_arrays_and_parts_that_a_query_needs_are_read(workspace):
    workspace.sql("SELECT count(*) FROM positions")
    assert workspace.database.stats.chunks == 0
    workspace.sql("SELECT entropy FROM positions WHERE model = 'beta' AND corpus = 'second' AND doc_id = 0")
    stats = workspace.database.stats
    assert (stats.chunks, stats.scans[0].parts) == (1, 1)
    size = next((workspace.root / "distributions" / "beta-second" / "part-00000.zarr" / "entropy_T").rglob("0")).stat().st_size
    assert 0 < stats.stored_bytes <= size
    assert stats.scans[0].columns == ["model", "corpus", "doc_id", "entropy"]


def test_a_missing_or_damaged_part_is_named_and_the_others_can_be_read(tmp_path):
    build_store(tmp_path / "w", seed=6)
    workspace = Workspace.open(tmp_path / "w")
    (array,) = (tmp_path / "w" / "distributions" / "alpha-first" / "part-00001.zarr" / "entropy_T").rglob("0")
    data = bytearray(array.read_bytes())
    data[3] ^= 1
    array.write_bytes(data)
    with pytest.raises(DamagedPart, match=r"alpha-first/part-00001\.zarr.*entropy_T"):
        workspace.sql("SELECT avg(entropy) FROM positions")
    assert workspace.sql("SELECT avg(entropy) AS e FROM positions WHERE part <> 1")["e"].item() > 0
    assert workspace.sql("SELECT sum(position) AS n FROM positions")["n"].item() > 0
    array.unlink()
    with pytest.raises(DamagedPart, match="missing or cut short"):
        Workspace.open(tmp_path / "w").sql("SELECT entropy FROM positions WHERE model = 'alpha'")
    result = fuseline(tmp_path / "w", "SELECT entropy FROM positions")
    assert result.returncode == 1
    assert "part-00001.zarr" in result.stderr
    assert "Traceback" not in result.stderr
    text = tmp_path / "w" / "corpus" / "second" / "part-00000.parquet"
    text.write_bytes(text.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedPart, match=r"second/part-00000\.parquet"):
        workspace.sql("SELECT text FROM texts")
    assert len(workspace.sql("SELECT text FROM texts WHERE corpus = 'first' AND doc_id = 0")) == 1


def test_what_is_folded_later_is_seen_by_the_same_workspace(tmp_path):
    build_store(tmp_path / "w", seed=7)
    workspace = Workspace.open(tmp_path / "w")
    before = workspace.sql("SELECT count(*) AS n FROM targets WHERE name = 'fused-second'")["n"].item()
    for path in (tmp_path / "w" / "targets" / "fused-second").glob("part-00000.json"):
        path.unlink()
    catalog.fold(workspace)  # nothing is held between two queries
    assert before > 0
    assert workspace.sql("SELECT count(*) AS n FROM targets WHERE name = 'fused-second'")["n"].item() == 0


def test_alignments_outlive_the_distributions_that_they_were_made_from(tmp_path):
    build_store(tmp_path / "w", seed=8)
    shutil.rmtree(tmp_path / "w" / "distributions" / "alpha-first")
    workspace = Workspace.open(tmp_path / "w")
    catalog.fold(workspace)
    assert len(workspace.sql("SELECT position, source_position FROM alignments WHERE corpus = 'first'")) > 0
    with pytest.raises(DataError, match="alignments/beta-first--alpha-first"):
        workspace.sql("SELECT token FROM alignments WHERE corpus = 'first'")


def test_a_catalog_of_another_version_is_not_guessed_at(tmp_path):
    import duckdb

    build_store(tmp_path / "w", seed=9)
    workspace = Workspace.open(tmp_path / "w")
    with duckdb.connect(workspace.catalog_path) as connection:
        connection.execute("INSERT INTO migrations VALUES (99, now()::TIMESTAMP)")
    with pytest.raises(DataError, match="store rebuild"):
        workspace.sql("SELECT 1")


def test_what_each_source_brings_is_a_row_of_its_own_and_unknown_of_parts_of_an_earlier_version(tmp_path, byte_level_folder):
    workspace = small_workspace(tmp_path / "small", tokenizer_folder=byte_level_folder)
    found = workspace.sql("FROM target_sources ORDER BY doc_id, segment, source DESC")
    assert found["source"].to_list() == ["target", "source"] * 4
    assert found.select("chosen", "weight", "lost", "agreement").rows() == [(True, 1.0, 0.0, 1.0), (False, 0.0, 0.5, 0.25)] * 4
    assert found["cost"].null_count() == found["nll"].null_count() == 8, "NaN in the arrays"
    assert (found["n_spoken"] == found["n_positions"]).all()
    build_store(tmp_path / "earlier", seed=9)
    earlier = Workspace.open(tmp_path / "earlier").sql("FROM target_sources")
    segments = Workspace.open(tmp_path / "earlier").sql("FROM target_segments")
    assert len(earlier) == 2 * len(segments) > 0
    assert set(earlier["source"]) == {"alpha", "beta"}
    assert earlier.select("cost", "weight", "chosen", "n_spoken").null_count().row(0) == (len(earlier),) * 4
    assert segments["gold_nll"].null_count() == len(segments)


def test_a_catalog_of_the_version_before_is_brought_up_to_date_by_the_next_fold(tmp_path, byte_level_folder):
    import duckdb

    workspace = small_workspace(tmp_path / "small", tokenizer_folder=byte_level_folder)
    tables = ("target_sources", "target_segments", "parts", "datasets", "segments")
    expected = [sorted(map(repr, workspace.sql(f"FROM {table}").rows())) for table in tables]
    with duckdb.connect(workspace.catalog_path) as connection:
        connection.execute("DROP TABLE target_sources; ALTER TABLE target_segments DROP gold_nll; ALTER TABLE target_segments DROP n_gold")
        connection.execute("DROP TABLE training_evaluations")
        for column in ("clm_weight", "held_out_bpb", "mfu", "peak_memory_bytes", "warning"):
            connection.execute(f"ALTER TABLE metrics DROP {column}")
        connection.execute("DELETE FROM migrations WHERE version >= 3")
    catalog.fold(workspace)
    assert [sorted(map(repr, workspace.sql(f"FROM {table}").rows())) for table in tables] == expected


def test_parameters_and_connections(workspace):
    (expected,) = workspace.sql("SELECT count(*) FROM positions WHERE doc_id IN (0, 2)").row(0)
    found = workspace.sql("SELECT count(*) FROM positions WHERE list_contains($ids, doc_id)", {"ids": [0, 2]})
    assert found.row(0) == (expected,)
    with workspace.database.connect() as connection:
        assert connection.sql("SELECT count(*) FROM positions WHERE doc_id = 0 OR doc_id = 2").fetchall() == [(expected,)]
        assert workspace.sql("SELECT 1 AS one")["one"].item() == 1


def test_several_workspaces_threads_and_queries_within_queries(workspace):
    query = "SELECT count(*) AS n FROM distributions WHERE doc_id = 2"
    expected = workspace.sql(query)["n"].item()
    with workspace.database.stream("SELECT * FROM distributions") as answer:
        assert next(iter(answer)).num_rows > 0
        assert workspace.sql(query)["n"].item() == expected
        assert Workspace.open(str(workspace.root)).sql(query)["n"].item() == expected
        with pytest.raises(WorkspaceBusy):
            catalog.fold(workspace)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: workspace.sql(query)["n"].item(), range(40))) == {expected}
    catalog.fold(workspace)


def test_ctrl_c_ends_a_query_at_once_and_without_a_traceback(workspace):
    endless = "SELECT count(*) FROM distributions a, distributions b, distributions c, distributions d WHERE a.logprob < b.logprob + c.rank"
    command = [sys.executable, "-m", "fuseline", "sql", "-w", str(workspace.root), endless]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(6)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors


def test_a_reader_that_has_seen_enough_is_no_error(workspace):
    command = f"{sys.executable} -m fuseline sql -w {workspace.root} --format csv 'SELECT * FROM range(2000000)' | head -2"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert result.stdout.splitlines() == ["range", "0"]
    assert "Error" not in result.stderr
    assert "Traceback" not in result.stderr


def test_a_query_that_stops_early_or_is_not_read_to_its_end_leaves_nothing_behind(workspace):
    assert len(workspace.sql("SELECT * FROM distributions LIMIT 3")) == 3
    assert workspace.sql("SELECT sum(1) AS n FROM distributions")["n"].dtype == pl.Int64


@pytest.mark.parametrize("value", ["INTERVAL 3 days", "[INTERVAL 3 days]", "{'a': INTERVAL 3 days}"])
def test_intervals_are_refused_with_what_to_say_instead(workspace, value):
    with pytest.raises(UsageError, match=r"epoch\(took\)"):
        workspace.sql(f"SELECT {value} AS took")


def test_columns_of_the_same_name_are_distinguished(workspace):
    assert workspace.sql("SELECT 1 AS a, 2 AS a, 3 AS a_1").columns == ["a", "a_1", "a_1_1"]
    assert fuseline(workspace.root, "SELECT 1 AS a, 2 AS a", "--format", "csv").stdout == "a,a_1\n1,2\n"


def test_json_is_valid_and_exact_whatever_is_in_it(workspace):
    query = "SELECT ['nan'::FLOAT, 1.5] AS l, {'a': 'inf'::DOUBLE} AS s, [9007199254740993::HUGEINT] AS h, '\\xff'::BLOB AS b, 0.5 AS d"
    (row,) = json.loads(fuseline(workspace.root, query, "--format", "json").stdout, parse_constant=pytest.fail)
    assert row == {"l": [None, 1.5], "s": {"a": None}, "h": [9007199254740993], "b": "\\xff", "d": 0.5}
    result = fuseline(workspace.root, "SELECT '-infinity'::TIMESTAMP AS t", "--format", "json")
    assert "Traceback" not in result.stderr


def test_the_files_name_says_the_format(workspace, tmp_path):
    assert fuseline(workspace.root, "SELECT 1 AS a", "-o", str(tmp_path / "r.parquet")).returncode == 0
    assert pl.read_parquet(tmp_path / "r.parquet")["a"].to_list() == [1]
    for name, *arguments in (["r.txt"], ["no/r.csv"], ["r.csv", "--format", "table"]):
        result = fuseline(workspace.root, "SELECT 1 AS a", "-o", str(tmp_path / name), *arguments)
        assert result.returncode == 2
        assert "--output" in result.stderr
        assert ".tmp-" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["r.parquet"]


def test_a_table_shows_text_as_it_is_and_white_space_so_that_it_can_be_seen(workspace):
    output = fuseline(workspace.root, "SELECT ':smile: [bold]' AS a, ' the' AS b, chr(10) AS c").stdout
    assert ":smile: [bold]" in output
    assert '" the"' in output
    assert '"\\n"' in output


def test_a_query_that_is_not_text_is_refused(workspace):
    command = [sys.executable, "-m", "fuseline", "sql", "-w", str(workspace.root)]
    result = subprocess.run(command, input=b"SELECT '\xff'", capture_output=True, check=False)
    assert result.returncode == 2
    assert b"UTF-8" in result.stderr


def test_a_rebuild_that_fails_leaves_the_catalog_as_it_was(tmp_path):
    build_store(tmp_path / "w", seed=4)
    workspace = Workspace.open(tmp_path / "w")
    before = workspace.sql("SELECT count(*) AS n FROM positions")["n"].item()
    manifest = tmp_path / "w" / "distributions" / "alpha-first" / "part-00001.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    shutil.copy(manifest, manifest.with_name("part-00001 (copy).json"))  # is no part
    (tmp_path / "w" / "tokenizers" / "junk").mkdir()  # of which no dataset was made
    for _ in range(2):
        with pytest.raises(DamagedPart, match=r"part-00001\.json"):
            catalog.rebuild(workspace)
        assert before > 0
    assert workspace.sql("SELECT count(*) AS n FROM positions")["n"].item() == before
    workspace.catalog_path.unlink()
    with pytest.raises(DamagedPart):
        catalog.fold(workspace)
    with pytest.raises(DataError, match="no catalog yet"):
        workspace.sql("SELECT 1")
    manifest.unlink()
    catalog.fold(workspace)
    assert 0 < workspace.sql("SELECT count(*) AS n FROM positions")["n"].item() < before


def test_results_in_every_format(workspace, tmp_path):
    query = "SELECT doc_id, token, topk_ids, tail_logprob FROM positions WHERE model = 'alpha' AND corpus = 'second' ORDER BY ALL"
    expected = workspace.sql(query)
    assert fuseline(workspace.root, query, "--format", "parquet", "-o", str(tmp_path / "r.parquet")).returncode == 0
    assert pl.read_parquet(tmp_path / "r.parquet").equals(expected)
    in_json = fuseline(workspace.root, query, "--format", "json")
    assert [tuple(row.values()) for row in json.loads(in_json.stdout)] == [tuple(row) for row in expected.rows()]
    assert fuseline(workspace.root, query, "--format", "csv", "-o", str(tmp_path / "r.csv")).returncode == 0
    in_csv = pl.read_csv(tmp_path / "r.csv")
    assert in_csv["token"].to_list() == expected["token"].to_list()
    assert [json.loads(ids) if ids else None for ids in in_csv["topk_ids"]] == expected["topk_ids"].to_list()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["r.csv", "r.parquet"]


def test_an_empty_result_still_has_its_columns(workspace):
    query = "SELECT model, doc_id FROM positions WHERE doc_id = -5"
    assert fuseline(workspace.root, query, "--format", "csv").stdout == "model,doc_id\n"
    assert json.loads(fuseline(workspace.root, query, "--format", "json").stdout) == []


def test_the_query_comes_from_the_standard_input_too_and_stats_from_the_error_stream(workspace):
    result = fuseline(workspace.root, "--stats", stdin="SELECT count(entropy) AS n FROM positions WHERE doc_id = 1")
    assert result.returncode == 0, result.stderr
    assert "chunks" in result.stderr
    assert "positions: " in result.stderr
    assert "doc_id == 1" in result.stderr


def test_a_long_table_is_cut_and_says_so(workspace):
    result = fuseline(workspace.root, "SELECT * FROM range(3000)")
    assert "first 1,000 rows" in result.stdout
    assert "999" in result.stdout
    assert "1000 " not in result.stdout


def test_a_result_that_a_format_has_no_place_for_is_refused_and_no_file_is_left(workspace, tmp_path):
    (tmp_path / "r.csv").write_text("earlier")
    result = fuseline(workspace.root, "SELECT '-infinity'::TIMESTAMP AS b", "--format", "json", "-o", str(tmp_path / "r.csv"))
    assert result.returncode == 2
    assert "Cast" in result.stderr
    assert (tmp_path / "r.csv").read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["r.csv"]
