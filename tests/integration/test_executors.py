"""The executors with real processes, a real Ray cluster and a real Slurm: killed at random, and compared with one process, bit by bit."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner
from fuseline.cli import main
from fuseline.pipeline.executors.config import ExecutorConfig
from fuseline.pipeline.executors.executor import open_executor
from fuseline.store import journal
from fuseline.store.dataset import Dataset
from fuseline.store.errors import FuselineError
from fuseline.store.workspace import Workspace
from support.one_machine_slurm import missing, one_machine_slurm
from support.stages import TroubledStage
from support.workspaces import RECIPE, contents, kill_group, start, wait_for, write_project

SUPPORT = str(Path(__file__).parents[1])  # from which `support` is imported


@pytest.fixture(scope="module")
def project(tmp_path_factory, corpus_texts) -> Path:
    """A project of 40 small parts to train on."""
    return write_project(tmp_path_factory.mktemp("project"), texts=corpus_texts, recipe=RECIPE.replace("4096", "1024"))


def fuseline(*arguments: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fuseline", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | (environment or {}))


def done(*arguments: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    result = fuseline(*arguments, environment=environment)
    assert result.returncode == 0, result.stderr
    return result


def here(*arguments: object) -> None:
    """In this process, which loads torch once for all."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def ingested(project, models_dir, tmp_path_factory) -> Path:
    """Corpus and distributions, made in one process."""
    workspace = tmp_path_factory.mktemp("ingested") / "workspace"
    for stage in ("corpus", "distributions"):
        here("ingest", stage, project, "-w", workspace, "--models", models_dir)
    return workspace


@pytest.fixture(scope="module")
def reference(project, models_dir, ingested, tmp_path_factory) -> Path:
    """The same with alignments and targets."""
    workspace = Path(shutil.copytree(ingested, tmp_path_factory.mktemp("reference") / "workspace"))
    for stage in ("align", "fuse"):
        here(stage, project, "-w", workspace, "--models", models_dir)
    return workspace


@pytest.fixture
def workspace(ingested, tmp_path) -> Path:
    """A copy with corpus and distributions, and no records of runs."""
    return Path(shutil.copytree(ingested, tmp_path / "workspace", ignore=shutil.ignore_patterns("runs")))


def workers_of(workspace: Path, kind: str) -> list[journal.WorkerState]:
    folders = sorted((workspace / "runs").glob(f"*-{kind}-*"))
    return [state for folder in folders for state in journal.read_journals(folder)]


def killed_at_random(process: subprocess.Popen, workspace: Path, kind: str, *, times: int, seed: int) -> int:
    """Kill random workers that work on a part, until the process ends; returns how many."""
    generator, kills = random.Random(seed), 0
    while process.poll() is None:
        busy = [state for state in workers_of(workspace, kind) if state.unfinished and state.is_alive]
        if busy and kills < times:
            time.sleep(generator.random() * 0.05)
            with contextlib.suppress(ProcessLookupError):
                os.kill(generator.choice(busy).pid, signal.SIGKILL)
                kills += 1
        time.sleep(0.02)
    return kills


def assert_no_part_at_two_workers(workspace: Path, kind: str, *, kills: int) -> None:
    """A part is begun once, and once more for each worker that died while it worked on it; a worker has at most two."""
    states = workers_of(workspace, kind)
    begun = sum((state.begun for state in states), Counter())
    interrupted = sum((state.interrupted for state in states), Counter())
    assert all(begun[part] <= 1 + interrupted[part] for part in begun), (begun, interrupted)
    assert interrupted.total() <= 2 * kills
    times: dict[int, list[tuple[float, float]]] = {}  # part -> from when to when a worker had it
    for path in (workspace / "runs").glob(f"*-{kind}-*/workers/*.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            if record["event"] == "begun":
                ends = [r["at"] for r in records if r["event"] == "ended" or (r.get("part") == record["part"] and r["at"] > record["at"])]
                times.setdefault(record["part"], []).append((record["at"], min(ends)))
    for spans in times.values():
        spans.sort()
        assert all(earlier[1] <= later[0] for earlier, later in pairwise(spans)), spans


def aligned(workspace: Path, reference: Path) -> None:
    """Take the alignments from the reference."""
    for kind in ("alignments", "vocab_maps"):
        shutil.copytree(reference / kind, workspace / kind)


def same(workspace: Path, reference: Path, *kinds: str) -> bool:
    found, expected = contents(workspace), contents(reference)
    keys = {key for key in expected if key.split("/")[0] in kinds}
    assert keys
    assert keys == {key for key in found if key.split("/")[0] in kinds}
    return all(found[key] == expected[key] for key in keys)


def test_four_workers_killed_again_and_again_make_the_bits_of_one_process(project, models_dir, reference, tmp_path):
    workspace, kills = tmp_path / "workspace", 0
    stages = [(["ingest", "corpus"], "corpus"), (["align"], "alignments"), (["fuse"], "targets")]
    for seed, (stage, kind) in enumerate(stages):
        log = tmp_path / "log"
        process = start(*stage, project, "-w", workspace, "--models", models_dir, "--workers", 4, log=log)
        hits = killed_at_random(process, workspace, kind, times=4, seed=seed)
        assert process.returncode == 0, log.read_text()
        assert_no_part_at_two_workers(workspace, kind, kills=hits)
        kills += hits
        if kind == "corpus":  # the models' forward passes are the same as in the reference: the corpus is
            assert same(workspace, reference, "corpus")
            shutil.copytree(reference / "distributions", workspace / "distributions")
    assert kills >= 8
    assert same(workspace, reference, "corpus", "alignments", "vocab_maps", "targets")
    assert not list(workspace.rglob(".tmp-*"))


def test_two_workers_run_a_model_to_the_same_bits_and_one_is_killed(project, models_dir, reference, tmp_path):
    workspace = tmp_path / "workspace"
    shutil.copytree(reference, workspace, ignore=shutil.ignore_patterns("runs", "distributions", "catalog.duckdb"))
    shutil.copytree(reference / "distributions" / "target", workspace / "distributions" / "target")
    process = start("ingest", "distributions", project, "-w", workspace, "--models", models_dir, "--workers", 2, log=tmp_path / "log")
    kills = killed_at_random(process, workspace, "distributions", times=1, seed=0)
    assert process.returncode == 0, (tmp_path / "log").read_text()
    assert kills == 1
    assert_no_part_at_two_workers(workspace, "distributions", kills=kills)
    assert same(workspace, reference, "distributions")


def test_status_shows_from_the_files_what_runs_and_ctrl_c_ends_all_quietly(project, models_dir, workspace, tmp_path):
    log, watched = tmp_path / "log", tmp_path / "watched"
    process = start("align", project, "-w", workspace, "--models", models_dir, "--workers", 2, log=log)
    watch = start("status", "-w", workspace, "--watch", log=watched)
    try:
        wait_for(lambda: sum(bool(state.unfinished) for state in workers_of(workspace, "alignments")) == 2, process=process)
        pids = [state.pid for state in workers_of(workspace, "alignments")]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)  # in the midst of a part, for as long as it takes to look
        datasets = json.loads(done("status", "-w", workspace, "--json").stdout)["datasets"]
        (dataset,) = [item for item in datasets if item["kind"] == "alignments"]
        assert dataset["workers"] == 2
        assert dataset["running_parts"]
        assert dataset["parts"] + len(dataset["running_parts"]) <= dataset["expected_parts"]
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        assert "Traceback" not in log.read_text()
        assert "Run the same command again" in log.read_text()
        assert not any(_is_running(pid) for pid in pids)
        wait_for(lambda: "parts" in watched.read_text(), process=watch)
        watch.send_signal(signal.SIGINT)
        assert watch.wait() == 0
        assert "Traceback" not in watched.read_text()
    finally:
        for started in (process, watch):
            started.kill()
            started.wait()


def test_workers_end_with_a_killed_coordinator(project, models_dir, workspace, tmp_path):
    process = start("align", project, "-w", workspace, "--models", models_dir, "--workers", 2)
    wait_for(lambda: len(workers_of(workspace, "alignments")) == 2, process=process)
    pids = [state.pid for state in workers_of(workspace, "alignments")]
    kill_group(process)
    deadline = time.monotonic() + 30
    while any(_is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_damaged_part_is_reported_the_others_finish_and_the_next_run_makes_only_it(project, models_dir, reference, workspace):
    arguments = ("align", project, "-w", workspace, "--models", models_dir, "--workers", 2)
    source = Dataset.open(workspace / "distributions" / "source")
    bad = source.parts()[3]
    metadata = workspace / "distributions" / "source" / f"part-{bad:05d}.zarr" / "zarr.json"
    whole = metadata.read_bytes()
    metadata.write_bytes(whole[:-1])
    result = fuseline(*arguments)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    (log,) = re.findall(r"log: (\S+)", result.stderr)
    assert f"part {bad}:" in result.stderr
    assert "checksum" in Path(log).read_text()
    dataset = Dataset.open(workspace / "alignments" / "source--target")
    assert dataset.parts() == [part for part in source.parts() if part != bad]
    (status,) = [s for s in json.loads(done("status", "-w", workspace, "--json").stdout)["datasets"] if s["kind"] == "alignments"]
    assert status["failed_parts"] == [bad]
    metadata.write_bytes(whole)
    before = len(workers_of(workspace, "alignments"))
    done(*arguments)
    assert [dict(state.begun) for state in workers_of(workspace, "alignments")[before:]] == [{bad: 1}]
    assert same(workspace, reference, "alignments")


@pytest.fixture
def troubled(tmp_path, monkeypatch):
    """Runs the parts of a stage with troubles, until they are fixed."""
    monkeypatch.setenv("PYTHONPATH", SUPPORT, prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    opened = Workspace.create(tmp_path / "workspace")
    trouble = tmp_path / "trouble"
    trouble.touch()

    def run(config: ExecutorConfig, **troubles: set[int]) -> Path:
        dataset = opened.dataset("corpus", "troubled", identity={"stage": "troubled"})
        stage = TroubledStage(dataset, **({"raising": set(), "killing": set()} | troubles), while_there=trouble)
        missing_parts = sorted(set(range(20)) - set(dataset.parts()))
        with opened.run("corpus", name="troubled", parameters={}) as record:
            journal.prepare(record.folder)
            open_executor(config, say=print).run(stage, missing_parts, run_folder=record.folder, on_commit=lambda manifest: None)
        return record.folder

    run.trouble, run.dataset, run.root = trouble, tmp_path / "workspace" / "corpus" / "troubled", tmp_path / "workspace"
    return run


@pytest.mark.parametrize("workers", [1, 2])
def test_a_part_that_raises_is_tried_again_and_then_reported_with_its_log(troubled, monkeypatch, workers):
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")  # of the user's terminal
    config = ExecutorConfig(workers=workers, retries=2)
    with pytest.raises(FuselineError, match=r"corpus/troubled: 1 part failed") as raised:
        troubled(config, raising={4})
    assert raised.value.exit_code == 1
    assert "part 4: ValueError: part 4 is not to my liking (3 times)" in str(raised.value)
    (log,) = re.findall(r"log: (\S+)", str(raised.value))
    assert Path(log).read_text().count("Traceback") == 3
    assert Dataset.open(troubled.dataset).parts() == [part for part in range(20) if part != 4]
    troubled.trouble.unlink()
    folder = troubled(config, raising={4})
    assert [dict(state.begun) for state in journal.read_journals(folder)] == [{4: 1}]


def test_a_part_that_kills_its_worker_is_reported_and_the_others_finish(troubled, monkeypatch):
    monkeypatch.setattr("fuseline.pipeline.executors.ledger.MOST_DEATHS", 3)  # each costs the start of a process
    with pytest.raises(FuselineError, match=r"part 4: its worker died \(SIGKILL, perhaps out of memory\) \(3 times\)"):
        troubled(ExecutorConfig(workers=2), killing={4})
    assert Dataset.open(troubled.dataset).parts() == [part for part in range(20) if part != 4]


# ---- Ray -------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray_address():
    """A Ray cluster of two cores on this machine, in a process group of its own."""
    pytest.importorskip("ray", reason="Ray is not installed")
    folder = tempfile.mkdtemp(prefix="ray-")  # in it are sockets, whose paths must be short
    command = ["start", "--head", "--block", "--port=0", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"]
    log = Path(folder) / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *command, "--object-store-memory=100000000", f"--temp-dir={folder}"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), SUPPORT])},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(lambda: "--block" in log.read_text() and "Local node IP" in log.read_text(), process=process)
        wait_for(lambda: (Path(folder) / "ray_current_cluster").exists(), process=process)
        yield (Path(folder) / "ray_current_cluster").read_text().strip()
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def test_ray_with_one_of_two_workers_killed_makes_the_bits_of_one_process(
    project, models_dir, reference, workspace, ray_address, tmp_path, monkeypatch
):
    options = ("-w", workspace, "--models", models_dir, "--executor", "ray", "--workers", 2)
    aligned(workspace, reference)
    monkeypatch.setenv("RAY_ADDRESS", ray_address)
    log = tmp_path / "log"
    process = start("fuse", project, *options, log=log)
    kills = killed_at_random(process, workspace, "targets", times=1, seed=0)
    assert process.returncode == 0, log.read_text()
    assert kills == 1
    assert len(workers_of(workspace, "targets")) == 3
    assert_no_part_at_two_workers(workspace, "targets", kills=kills)
    assert same(workspace, reference, "alignments", "vocab_maps", "targets")


def test_no_ray_cluster_is_a_usage_error(project, models_dir, workspace):
    result = fuseline(
        "align", project, "-w", workspace, "--models", models_dir, "--executor", "ray", environment={"RAY_ADDRESS": "127.0.0.1:1"}
    )
    assert result.returncode == 2
    assert "The Ray cluster at 127.0.0.1:1 cannot be used" in result.stderr
    assert "Traceback" not in result.stderr


# ---- Slurm -----------------------------------------------------------------------------------------------------------------------------

needs_slurm = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> dict[str, str]:
    """The environment of a Slurm of one machine."""
    with one_machine_slurm(tmp_path_factory.mktemp("slurm")) as configuration:
        yield {"SLURM_CONF": str(configuration)}


def slurm_command(slurm: dict[str, str], *arguments: object) -> str:
    result = subprocess.run(list(map(str, arguments)), env=os.environ | slurm, capture_output=True, text=True, check=True)
    return result.stdout


@needs_slurm
def test_slurm_with_a_requeued_task_makes_the_bits_of_one_process(project, models_dir, reference, workspace, slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", slurm["SLURM_CONF"])
    options = ("-w", workspace, "--models", models_dir, "--executor", "slurm", "--workers", 2)
    aligned(workspace, reference)
    log = tmp_path / "log"
    process = start("fuse", project, *options, log=log)
    wait_for(lambda: any(state.unfinished for state in workers_of(workspace, "targets")), process=process)
    running = next(state for state in workers_of(workspace, "targets") if state.unfinished)
    os.kill(running.pid, signal.SIGSTOP)  # it must not get done meanwhile, nor in the time that Slurm leaves it
    task = running.worker.removeprefix("slurm-")
    slurm_command(slurm, "scontrol", "requeue", task)
    os.kill(running.pid, signal.SIGKILL)
    assert process.wait() == 0, log.read_text()
    (path,) = (workspace / "runs").glob(f"*-targets-*/workers/slurm-{task}.jsonl")
    assert path.read_text().count('"started"') == 2
    assert_no_part_at_two_workers(workspace, "targets", kills=1)
    assert same(workspace, reference, "targets")


@needs_slurm
def test_jobs_whose_coordinator_was_killed_go_on_and_are_followed(project, models_dir, reference, workspace, slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", slurm["SLURM_CONF"])
    (node,) = set(slurm_command(slurm, "sinfo", "-h", "-o", "%n").split())
    arguments = ("align", project, "-w", workspace, "--models", models_dir, "--executor", "slurm", "--workers", 2)
    slurm_command(slurm, "scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
    first = start(*arguments)

    def is_submitted() -> bool:
        names = slurm_command(slurm, "squeue", "-h", "-o", "%j").split()
        is_queued = any(path.stem in names for path in (workspace / "runs").glob("*/slurm/*.json"))
        return is_queued and any((workspace / "runs").glob("*/logs/*/*_submitted.pkl"))  # what submitit writes last

    try:
        wait_for(is_submitted, process=first)
    finally:
        kill_group(first)
    log = tmp_path / "log"
    second = start(*arguments, log=log)
    wait_for(lambda: "following fuseline-" in log.read_text(), process=second)
    slurm_command(slurm, "scontrol", "update", f"nodename={node}", "state=resume")
    assert second.wait() == 0, log.read_text()
    assert len(list((workspace / "runs").glob("*/slurm/*vocab_maps*.json"))) == 1
    assert same(workspace, reference, "alignments", "vocab_maps")


@needs_slurm
def test_slurm_reports_what_failed_and_makes_the_rest(troubled, slurm, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", slurm["SLURM_CONF"])
    monkeypatch.setattr("fuseline.pipeline.executors.slurm._QUEUE_SECONDS", 1.0)
    with pytest.raises(FuselineError, match=r"2 parts failed") as raised:
        troubled(ExecutorConfig(kind="slurm", workers=2, retries=1), raising={4}, killing={5})
    assert "part 4: ValueError: part 4 is not to my liking" in str(raised.value)
    assert Path(re.findall(r"log: (\S+)", str(raised.value))[0]).read_text().count("Traceback") == 2
    assert "part 5: its tasks ended without making it" in str(raised.value)
    assert Dataset.open(troubled.dataset).parts() == [part for part in range(20) if part not in {4, 5}]
    troubled.trouble.unlink()
    troubled(ExecutorConfig(kind="slurm", workers=2))
    assert Dataset.open(troubled.dataset).parts() == list(range(20))


def test_no_slurm_is_a_usage_error(project, models_dir, workspace, tmp_path):
    options = ("-w", workspace, "--models", models_dir, "--executor", "slurm")
    result = fuseline("align", project, *options, environment={"PATH": str(tmp_path)})
    assert result.returncode == 2
    assert "needs sbatch, squeue, srun on the PATH" in result.stderr
    assert "Traceback" not in result.stderr


def test_training_needs_no_slurm(project, models_dir, tmp_path):
    recipe = project.with_name("slurm.toml")
    recipe.write_text(f'{project.read_text()}\n[executor]\nkind = "slurm"\n')
    options = ("-w", tmp_path / "workspace", "--models", models_dir)
    result = fuseline("train", recipe, *options, "--only", "nothing", environment={"PATH": str(tmp_path)})
    assert result.returncode == 2
    assert "--only (nothing) must be a training of the recipe" in result.stderr
