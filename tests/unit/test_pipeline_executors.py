"""The bookkeeping around workers: who has which part, what is tried again, what a journal says, what a recipe may ask for."""

import json
import os
import subprocess
import sys
import time

import pytest
from fuseline.pipeline.executors.config import ExecutorConfig
from fuseline.pipeline.executors.crew import Lost, share_out
from fuseline.pipeline.executors.ledger import MOST_DEATHS, MOST_SETBACKS, Ledger
from fuseline.pipeline.executors.local import LocalCrew
from fuseline.pipeline.executors.work import Assignment, Committed, Failed, Worker
from fuseline.pipeline.recipe_file import load_recipe
from fuseline.store import journal
from fuseline.store.dataset import Dataset, PartContent
from fuseline.store.errors import DataError, UsageError
from fuseline.store.manifest import Manifest


def committed(part: int) -> Committed:
    return Committed(manifest=Manifest(fingerprint="", part=part, payload="", counts={}, files={}, producer={}))


def failed(part: int, kind: str = "error") -> Failed:
    return Failed(part=part, reason="no luck", kind=kind)


class TestLedger:
    def test_each_part_is_at_one_worker(self):
        ledger = Ledger(range(5), retries=0)
        taken = [ledger.take(worker) for worker in ("a", "b", "a", "c", "b", "a")]
        assert taken == [0, 1, 2, 3, 4, None]
        assert not ledger.is_done
        for worker, part in (("a", 0), ("b", 1), ("a", 2), ("c", 3), ("b", 4)):
            ledger.note(worker, committed(part))
        assert ledger.is_done
        assert not ledger.failed

    def test_an_error_is_tried_again_after_the_others_and_then_reported(self):
        ledger = Ledger([7, 8], retries=2)
        order = []
        while (part := ledger.take("a")) is not None:
            order.append(part)
            ledger.note("a", failed(part) if part == 7 else committed(part))
        assert order == [7, 8, 7, 7]
        assert ledger.failed == {7: "no luck (3 times)"}
        assert ledger.is_done

    def test_a_mistake_is_not_tried_again(self):
        ledger = Ledger([7], retries=5)
        ledger.note("a", failed(ledger.take("a"), "mistake"))
        assert ledger.failed == {7: "no luck"}

    def test_deaths_are_counted_apart_and_are_bounded(self):
        ledger = Ledger([7], retries=0)
        for number in range(MOST_DEATHS):
            assert ledger.take(f"w{number}") == 7
            assert ledger.lost(f"w{number}", reason="SIGKILL") == [7]
            ledger.give_back(7, reason="SIGKILL")
        assert ledger.is_done
        assert ledger.failed == {7: f"its worker died (SIGKILL) ({MOST_DEATHS} times)"}

    def test_what_was_being_written_when_a_worker_died_is_no_suspect(self):
        ledger = Ledger([0, 4], retries=0)
        for number in range(MOST_DEATHS):
            worker = f"w{number}"
            held = [ledger.take(worker), ledger.take(worker)]
            assert sorted(held) == [0, 4]
            assert ledger.lost(worker, reason="SIGKILL") == held
            ledger.give_back(0, reason="SIGKILL", is_suspect=False)
            ledger.give_back(4, reason="SIGKILL")
        assert ledger.failed.keys() == {4}
        assert ledger.take("w") == 0

    def test_deaths_of_earlier_workers_count(self):
        ledger = Ledger([7], retries=0, deaths={7: MOST_DEATHS - 1})
        ledger.take("a")
        ledger.lost("a", reason="SIGKILL")
        ledger.give_back(7, reason="SIGKILL")
        assert ledger.is_done
        ledger = Ledger([7, 8], retries=0, deaths={7: MOST_DEATHS})
        assert ledger.take("a") == 8
        assert ledger.failed.keys() == {7}

    def test_a_folder_that_cannot_be_written_stops_the_handing_out(self):
        ledger = Ledger(range(100), retries=2)
        ledger.take("a"), ledger.take("b")
        ledger.note("a", failed(0, "unwritable"))
        assert ledger.take("a") is None
        assert not ledger.is_done  # b is still at it
        ledger.note("b", committed(1))
        assert ledger.is_done
        assert ledger.unwritable == "no luck"
        assert not ledger.failed

    def test_where_nothing_goes_well_it_gives_up(self):
        ledger = Ledger(range(1000), retries=2)
        tried = 0
        while (part := ledger.take("a")) is not None:
            ledger.note("a", failed(part))
            tried += 1
        assert tried == MOST_SETBACKS
        assert ledger.is_done
        assert len(ledger.failed) == 1000

    def test_workers_that_die_before_they_take_a_part_end_it_too(self):
        ledger = Ledger(range(3), retries=2)
        for number in range(MOST_SETBACKS):
            assert not ledger.is_done
            assert ledger.lost(f"w{number}", reason="exit code 1") == []
        assert ledger.is_done

    def test_errors_here_and_there_do_not(self):
        ledger = Ledger(range(200), retries=0)
        while (part := ledger.take("a")) is not None:
            ledger.note("a", failed(part) if part % 2 else committed(part))
        assert len(ledger.failed) == 100


class _Crew:
    """Workers without an engine: each answers as a script says, in the order in which it was asked."""

    def __init__(self, script):
        self.script, self.asked, self.dismissed, self.hired = script, [], [], []

    def hire(self, worker):
        self.hired.append(worker)
        self.asked.append((worker, "hello"))

    def give(self, worker, part):
        self.asked.append((worker, part))

    def wait(self):
        worker, part = self.asked.pop(0)
        return [(worker, [] if part == "hello" else self.script(worker, part))]

    def dismiss(self, worker):
        self.dismissed.append(worker)


def test_a_worker_that_failed_or_died_is_replaced_and_all_are_dismissed(tmp_path):
    dataset = Dataset.create(tmp_path / "corpus" / "x", identity={"stage": "x"})
    troubled = {3: [failed(3)], 5: Lost("SIGKILL")}
    made = []
    crew = _Crew(lambda worker, part: troubled.pop(part, None) or ([committed(part)] if part is not None else []))
    share_out(crew, Ledger(range(8), retries=1), size=2, dataset=dataset, on_commit=lambda manifest: made.append(manifest.part))
    assert sorted(made) == list(range(8))
    assert len(crew.hired) == 4
    assert sorted(crew.dismissed) == sorted(crew.hired)


class TestWorkersThatCannotBeStarted:
    @pytest.fixture
    def processes(self, monkeypatch):
        """The processes that were started; the second cannot be."""
        started, popen = [], subprocess.Popen

        def start(*arguments, **options):
            if started:
                raise self.error
            started.append(popen(*arguments, **options))
            return started[-1]

        monkeypatch.setattr(subprocess, "Popen", start)
        return started

    @pytest.mark.parametrize("error", [BlockingIOError(11, "Resource temporarily unavailable"), KeyboardInterrupt()])
    def test_their_error_is_reported_and_the_others_are_ended(self, run_folder, processes, error):
        self.error = error
        dataset = Dataset.create(run_folder.parent.parent / "corpus" / "x", identity={"stage": "x"})
        assignment = Assignment(stage=_Stage(dataset), run_folder=run_folder, directory=run_folder)
        crew = LocalCrew(assignment, size=3, gpus=[])
        with pytest.raises(type(error)):
            share_out(crew, Ledger(range(8), retries=1), size=3, dataset=dataset, on_commit=lambda manifest: None)
        (process,) = processes
        assert process.returncode is not None

    def test_one_that_cannot_be_ended_does_not_keep_the_others(self, tmp_path):
        class Stubborn(_Crew):
            def dismiss(self, worker):
                super().dismiss(worker)
                if worker == "worker-2":
                    raise RuntimeError("no")

        dataset = Dataset.create(tmp_path / "corpus" / "x", identity={"stage": "x"})
        crew = Stubborn(lambda worker, part: [committed(part)])
        with pytest.raises(RuntimeError, match="no"):
            share_out(crew, Ledger(range(8), retries=1), size=4, dataset=dataset, on_commit=lambda manifest: None)
        assert sorted(crew.dismissed) == ["worker-1", "worker-2", "worker-3", "worker-4"]


class _Stage:
    def __init__(self, dataset, *, error=None):
        self.dataset, self.error = dataset, error

    def compute(self, part):
        if self.error:
            raise self.error
        import polars as pl

        return PartContent(data=pl.DataFrame({"part": [part]}), counts={"documents": 1})


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "workspace" / "runs" / "run"
    folder.mkdir(parents=True)
    journal.prepare(folder)
    return folder


def worker(run_folder, **options):
    dataset = Dataset.create(run_folder.parent.parent / "corpus" / "x", identity={"stage": "x"})
    assignment = Assignment(stage=_Stage(dataset, **options), run_folder=run_folder, directory=run_folder)
    return Worker(assignment, name="w"), dataset


@pytest.fixture(autouse=True)
def _stay_here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # a worker changes the directory, and this changes it back


class TestWorker:
    def test_a_part_is_written_while_the_next_is_computed(self, run_folder):
        own, dataset = worker(run_folder)
        with own:
            assert own.step(0) == []
            assert [outcome.part for outcome in own.step(1)] == [0]
            (state,) = journal.read_journals(run_folder)
            assert state.is_alive
            assert state.unfinished == [1]
            assert [outcome.part for outcome in own.step(None)] == [1]
            assert own.step(None) == []
        (state,) = journal.read_journals(run_folder)
        assert not state.is_alive
        assert state.begun == {0: 1, 1: 1}
        assert dataset.parts() == [0, 1]

    def test_a_user_mistake_has_no_traceback_and_an_error_has_one(self, run_folder):
        for error, kind in ((DataError("Document 3 is odd."), "mistake"), (ValueError("odd"), "error")):
            own, _ = worker(run_folder, error=error)
            with own:
                (outcome,) = own.step(4)
            assert outcome.kind == kind
            log = journal.failure_log(run_folder, 4).read_text()
            assert str(error) in log
            assert ("Traceback" in log) == (kind == "error")
        (state,) = journal.read_journals(run_folder)
        assert state.failed == {4: "ValueError: odd"}

    def test_what_is_being_written_when_a_part_fails_is_kept(self, run_folder):
        own, dataset = worker(run_folder)
        with own:
            own.step(0)
            own.stage.error = ValueError("odd")
            first, second = own.step(1)
        assert isinstance(first, Committed)
        assert isinstance(second, Failed)
        assert dataset.parts() == [0]

    def test_a_folder_that_cannot_be_written_is_distinguished_from_an_error(self, run_folder, monkeypatch):
        own, _ = worker(run_folder)

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Dataset, "commit", full)
        with own:
            own.step(0)
            (outcome,) = own.step(None)
        assert outcome.kind == "unwritable"
        assert "No space left on device" in outcome.reason

    def test_a_machine_that_does_not_see_the_workspace_makes_none(self, run_folder):
        with pytest.raises(FileNotFoundError, match="shared storage"):
            journal.Journal(run_folder.with_name("elsewhere"), worker="w")
        assert not run_folder.with_name("elsewhere").exists()


class TestJournal:
    def test_a_worker_that_was_started_again_was_interrupted(self, run_folder):
        for _ in range(2):
            own = journal.Journal(run_folder, worker="w")
            own.begun(3)
        own.committed(3)
        own.begun(4)
        (state,) = journal.read_journals(run_folder)
        assert (state.interrupted, state.unfinished, state.begun) == ({3: 1}, [4], {3: 2, 4: 1})
        journal.end_of(run_folder, worker="w")
        (state,) = journal.read_journals(run_folder)
        assert not state.is_alive
        assert state.interrupted == {3: 1, 4: 1}

    def test_one_that_was_not_refreshed_for_long_is_dead(self, run_folder):
        journal.Journal(run_folder, worker="w").begun(3)
        path = run_folder / "workers" / "w.jsonl"
        past = time.time() - journal.DEAD_SECONDS - 1
        os.utime(path, (past, past))
        (state,) = journal.read_journals(run_folder)
        assert not state.is_alive

    def test_a_line_that_was_cut_short_is_left_out(self, run_folder):
        with journal.Journal(run_folder, worker="w") as own:
            own.begun(3)
        path = run_folder / "workers" / "w.jsonl"
        path.write_bytes(path.read_bytes() + b'{"event": "begun", "par')
        (state,) = journal.read_journals(run_folder)
        assert state.begun == {3: 1}


class TestRecipe:
    @pytest.mark.parametrize(
        ("section", "message"),
        [
            ("[executor]\nworkers = 0", "executor.workers: 0 should be greater than or equal to 1"),
            ('[executor]\nkind = "slurmy"', "executor.kind: 'slurmy' should be 'local', 'slurm' or 'ray'"),
            ("[executor.resources.distributionz]\ngpus = 1", "unknown key. Did you mean distributions?"),
            ("[executor.resources.evaluations]\ngpu = 1", "unknown key. Did you mean gpus?"),
            ("[executor.slurm]\npartition = [1]", "partition ([1]) must be text, a number, or true"),
            ('[executor.slurm]\njob-name = "x"', "job-name is set by fuseline"),
            ("[executor.slurm]\ncpus-per-task = 8", "cpus-per-task is set from [executor.resources]: set cpus in"),
            ("[executor.slurm]\ngpus_per_node = 2", "gpus_per_node is set from [executor.resources]: set gpus in"),
            ('[executor.slurm]\nmem = "8G"', "mem is set from [executor.resources]: set memory_gb in"),
            ('[executor.slurm]\ncomment = "x\\ntouch /tmp/x #"', "comment ('x\\ntouch /tmp/x #') must not contain control characters"),
            ('[executor.slurm]\ncomment = "x\\u2028y"', "must not contain control characters"),
            ('[executor.slurm]\n"comment=x\\ntouch /tmp/x #" = true', "must not be in a recipe"),
            *(
                (f'[executor.slurm]\n"{name}" = "x"', f"'{name}' must not be in a recipe: remove it, and set SBATCH_…")
                for name in ("Qos x", "wrap", "wra", "export", "export_file", "chdi", "container_image", "task_prolog", "uenv", "wait")
            ),
            ('[executor]\nray_address = "10.0.0.1:6379"', "ray_address must not be in a recipe: remove it, and set RAY_ADDRESS"),
            ("[executor.slurm]\ntime = 90", "time is set from [executor.resources]: set minutes in"),
        ],
    )
    def test_what_is_wrong_is_reported_with_its_line(self, tmp_path, section, message):
        from support.workspaces import RECIPE

        (tmp_path / "recipe.toml").write_text(f"{RECIPE}\n{section}\n")
        with pytest.raises(UsageError) as raised:
            load_recipe(tmp_path / "recipe.toml")
        assert message in str(raised.value)
        assert "1 problem:" in str(raised.value)

    def test_all_wrong_options_of_sbatch_are_reported_at_once(self, tmp_path):
        from support.workspaces import RECIPE

        section = '[executor.slurm]\narray = "1"\npartition = "gpu"\ntime = 90\nwrap = "x"\nqos = false\ncomment = "x\\ny"\n'
        (tmp_path / "recipe.toml").write_text(f"{RECIPE}\n{section}")
        with pytest.raises(UsageError, match="has 5 problems:") as raised:
            load_recipe(tmp_path / "recipe.toml")
        first, *lines = str(raised.value).splitlines()
        assert first.endswith("has 5 problems:")
        assert len({line.split(":")[0] for line in lines}) == 5, "each has its own line of the recipe"
        for key in ("array", "time", "wrap", "qos", "comment"):
            assert sum(f"executor.slurm.{key}: " in line for line in lines) == 1

    def test_evaluations_are_given_what_distributions_are(self):
        config = ExecutorConfig.model_validate({"resources": {"distributions": {"gpus": 2}}})
        assert config.resources.of("evaluations").gpus == 2
        assert config.resources.of("corpus").gpus == 0


def test_the_queue_of_slurm_is_asked_once_for_all_jobs(run_folder, monkeypatch):
    """However many jobs there are: all users of a cluster wait for it."""
    pytest.importorskip("submitit")
    from fuseline.pipeline.executors import slurm

    dataset = Dataset.create(run_folder.parent.parent / "corpus" / "x", identity={"stage": "x"})
    stage = _Stage(dataset)
    names = []
    for number in range(5):
        job = slurm._Job(name=f"fuseline-run-{number}", run_folder=run_folder, slices=[[number]])
        job.save(dataset)
        names.append(job.name)
    looks = 0

    def queue():
        nonlocal looks
        looks += 1
        if looks == 3:
            for part in range(5):
                dataset.commit(part, content=stage.compute(part), seconds=0)
        return {name: {0} for name in names} if looks < 3 else {}

    monkeypatch.setattr(slurm, "_queue", queue)
    monkeypatch.setattr(slurm, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(slurm, "_QUEUE_SECONDS", 0.0)
    monkeypatch.setattr(slurm.shutil, "which", lambda command: command)
    made = []
    executor = slurm.SlurmExecutor(ExecutorConfig(kind="slurm"), say=lambda text: None)
    executor.run(stage, range(5), run_folder=run_folder, on_commit=lambda manifest: made.append(manifest.part))
    assert made == list(range(5))
    assert looks == 3


@pytest.mark.parametrize(("kind", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_an_extra_that_is_not_installed_is_named(kind, package):
    program = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from fuseline.pipeline.executors.config import ExecutorConfig\nfrom fuseline.pipeline.executors.executor import open_executor\n"
        "from fuseline.store.errors import UsageError\n"
        f"try: open_executor(ExecutorConfig(kind={kind!r}), say=print)\nexcept UsageError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert f"pip install 'fuseline[{kind}]'" in result.stdout


def test_the_journal_of_a_worker_says_where_it_is(run_folder):
    with journal.Journal(run_folder, worker="w"):
        record = json.loads((run_folder / "workers" / "w.jsonl").read_text().splitlines()[0])
    assert record["event"] == "started"
    assert record["pid"] == os.getpid()
