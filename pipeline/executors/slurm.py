"""Runs the parts of a stage as a Slurm job array, through submitit: each task has a slice of the parts.

Tasks need no coordinator. If the coordinator is killed, the tasks keep running. The same command starts a new coordinator, which follows
them: it finds the jobs by name, and reads their slices from the run's folder, where they are written before sbatch is called.

    runs/<run>/slurm/<job name>.json      the slices of a job's tasks
    runs/<run>/logs/<job id>/             files of submitit, and the tasks' output

A task that is preempted or runs out of time is requeued, and skips committed parts. Every machine must see the workspace, the models and
this Python under the same paths.
"""

import getpass
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...store import durable, journal
from ...store.dataset import Dataset
from ...store.errors import DamagedPart, FuselineError, UsageError, reason_of
from ...store.json_files import is_count, read_object
from ...store.manifest import MOST_PARTS
from .config import ExecutorConfig
from .crew import work_alone
from .ledger import Ledger, parts_failed, require_all
from .work import Assignment, Follow, Stage

try:
    import submitit
except ImportError as error:
    raise UsageError("Install submitit for --executor slurm: pip install 'fuseline[slurm]'.") from error

_DEFAULT_WORKERS = 4
_POLL_SECONDS = 1.0  # between two checks for manifests
_QUEUE_SECONDS = 15.0  # between two calls of squeue, whose server all users of a cluster share
_SIGNAL_SECONDS = 90  # before the end of a task's time, so that it may finish the part that it works on
_Queue = dict[str, set[int]]  # job name -> indices of its queued or running tasks (0 if the job is no array)
_NO_LIMIT = 1_000_000  # of requeues: `Task` counts how often a part was started


class SlurmExecutor:
    """Runs parts in at most `workers` tasks at a time."""

    def __init__(self, config: ExecutorConfig, *, say: Callable[[str], None]) -> None:
        """Raises UsageError if Slurm is not available."""
        self.config, self._say = config, say
        missing = [command for command in ("sbatch", "squeue", "srun") if shutil.which(command) is None]
        if missing:
            raise UsageError(f"Run fuseline on a login node of the cluster: --executor slurm needs {', '.join(missing)} on the PATH.")

    def run(self, stage: Stage, parts: Sequence[int], *, run_folder: Path, on_commit: Follow) -> None:
        """See `Executor.run`. After a KeyboardInterrupt the jobs keep running."""
        dataset, missing, fruitless = stage.dataset, set(parts), 0
        failed: dict[int, str] = {}
        queue = _queue()
        jobs = list(_jobs_at_work(run_folder.parent, dataset, queue=queue))
        if jobs:
            self._say(f"{dataset.kind}/{dataset.name}: following {', '.join(job.name for job in jobs)}, submitted before")
        while missing - failed.keys() and fruitless <= self.config.retries:
            uncovered = missing - failed.keys() - {part for job in jobs for part in job.parts_at_work(queue)}
            if uncovered:
                if jobs:
                    self._say(f"submitting {len(uncovered)} missing parts again, because no task works on them any more")
                jobs.append(self._submit(stage, _hopeful_first(uncovered, jobs), run_folder=run_folder, number=len(jobs) + 1))
            n_before = len(missing)
            try:
                queue = self._follow(jobs, missing, dataset=dataset, on_commit=on_commit)
            except KeyboardInterrupt:
                names = ",".join(job.name for job in jobs)
                self._say(f"The Slurm tasks keep running; run the same command to follow them again. To stop them: scancel --name={names}")
                raise
            failed = {part: reason for job in jobs for part, reason in job.failed().items() if part in missing}
            fruitless = fruitless + 1 if len(missing) == n_before else 0
        if missing:
            reasons = {part: failed.get(part, "its tasks ended without making it") for part in missing}
            raise parts_failed(dataset, reasons, run_folder=jobs[-1].run_folder)

    def _submit(self, stage: Stage, parts: Sequence[int], *, run_folder: Path, number: int) -> "_Job":
        if "%" in str(run_folder.absolute()):
            raise UsageError(f"Use a --workspace without % in its path: sbatch replaces % in the paths of logs ({run_folder.absolute()}).")
        n_tasks = min(self.config.workers or _DEFAULT_WORKERS, len(parts))
        job = _Job(
            name=f"fuseline-{run_folder.name}-{number}",
            run_folder=run_folder.absolute(),
            slices=[list(parts[index::n_tasks]) for index in range(n_tasks)],
        )
        job.save(stage.dataset)
        assignment = Assignment(stage=stage, run_folder=job.run_folder, directory=Path.cwd())
        tasks = [Task(assignment=assignment, parts=part_slice, retries=self.config.retries) for part_slice in job.slices]
        executor = submitit.SlurmExecutor(job.run_folder / "logs" / "%j", max_num_timeout=_NO_LIMIT)
        executor.update_parameters(**self._parameters(stage.dataset.kind, name=job.name, n_tasks=n_tasks))
        try:
            submitted = executor.submit_array(tasks)
        except (submitit.core.utils.FailedJobError, subprocess.SubprocessError, OSError) as error:
            job.path.unlink()
            raise UsageError(f"sbatch refused the job: {error}\nCheck [executor.resources] and [executor.slurm] in the recipe.") from error
        self._say(
            f"{stage.dataset.kind}/{stage.dataset.name}: submitted {n_tasks} Slurm tasks as job {submitted[0].job_id.split('_')[0]}; "
            f"they keep running if this command stops. To stop them: scancel --name={job.name}"
        )
        return job

    def _parameters(self, kind: str, *, name: str, n_tasks: int) -> dict[str, Any]:
        resources = self.config.resources.of(kind)
        parameters = {
            "job_name": name,
            "cpus_per_task": resources.cpus,
            "time": resources.minutes,
            "array_parallelism": n_tasks,
            "signal_delay_s": _SIGNAL_SECONDS,
            # PYTHONSAFEPATH: import no module from the folder in which sbatch was called.
            "setup": ["export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}", "export PYTHONSAFEPATH=1"],
            "additional_parameters": {"requeue": True} | {key.replace("_", "-"): value for key, value in self.config.slurm.items()},
        }
        if resources.gpus:
            parameters["gpus_per_node"] = resources.gpus
        if resources.memory_gb is not None:
            parameters["mem"] = f"{round(resources.memory_gb * 1000)}M"
        return parameters

    def _follow(self, jobs: "Sequence[_Job]", missing: set[int], *, dataset: Dataset, on_commit: Follow) -> _Queue:
        """Remove parts from `missing` as they appear, until all are there or no task is running. Return the last queue."""
        asked, queue = time.monotonic(), {job.name: set(range(len(job.slices))) for job in jobs}
        while missing and any(job.tasks_at_work(queue) for job in jobs):
            time.sleep(_POLL_SECONDS)
            if time.monotonic() - asked > _QUEUE_SECONDS:
                asked, queue = time.monotonic(), _queue()
            for part in sorted(missing & set(dataset.parts())):
                on_commit(dataset.manifest(part))
                missing.discard(part)
        return queue


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task of the array: it makes its slice of the parts, one by one. submitit calls it, and `checkpoint` when its time is over."""

    assignment: Assignment
    parts: list[int]
    retries: int

    def __call__(self) -> None:
        """Make the missing parts of the slice.

        Raises:
            FuselineError: parts failed.
        """
        dataset, run_folder = self.assignment.stage.dataset, self.assignment.run_folder
        os.chdir(self.assignment.directory)
        states = list(journal.read_journals(run_folder))
        failed = {part for state in states for part in state.failed}
        missing = [part for part in self.parts if part not in failed | set(dataset.parts())]
        deaths = _interrupted(states)  # includes parts that took longer than a task's time
        ledger = Ledger(missing, retries=self.retries, deaths=deaths, say=lambda text: print(text, flush=True))
        work_alone(self.assignment, ledger, worker=f"slurm-{submitit.JobEnvironment().job_id}", on_commit=lambda manifest: None)
        require_all(dataset, ledger, run_folder=run_folder)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """The task to run after a requeue: the same task, because it skips committed parts."""
        return submitit.helpers.DelayedSubmission(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A job array and the parts of its tasks."""

    name: str
    run_folder: Path
    slices: list[list[int]]

    @property
    def path(self) -> Path:
        return self.run_folder / "slurm" / f"{self.name}.json"

    def save(self, dataset: Dataset) -> None:
        self.path.parent.mkdir(exist_ok=True)
        record = {"dataset": f"{dataset.kind}/{dataset.name}", "fingerprint": dataset.fingerprint, "slices": self.slices}
        durable.write_json(self.path, record)

    def tasks_at_work(self, queue: _Queue) -> set[int]:
        """Indices of the tasks that are queued or running."""
        return queue.get(self.name, set())

    def parts_at_work(self, queue: _Queue) -> set[int]:
        """The parts of these tasks."""
        return {part for task in self.tasks_at_work(queue) for part in self.slices[task]}

    def failed(self) -> dict[int, str]:
        """Parts that failed permanently, with the reason."""
        return {part: reason for state in journal.read_journals(self.run_folder) for part, reason in state.failed.items()}


def _jobs_at_work(runs_folder: Path, dataset: Dataset, *, queue: _Queue) -> Iterator[_Job]:
    """The unfinished jobs that an earlier coordinator submitted for this dataset."""
    for path in sorted(runs_folder.glob("*/slurm/*.json")):
        if path.stem not in queue:
            continue
        try:
            record = read_object(path)
            slices = record["slices"]
            if not all(is_count(part, below=MOST_PARTS) for parts in slices for part in parts):
                raise ValueError("slices must be lists of parts")
            if record["fingerprint"] == dataset.fingerprint:
                yield _Job(name=path.stem, run_folder=path.parent.parent.absolute(), slices=slices)
        except (OSError, ValueError, KeyError, TypeError) as error:
            remedy = f"Remove it, and cancel the job: scancel --name={path.stem}"
            raise DamagedPart(f"{path} cannot be read ({reason_of(error)}).", remedy=remedy) from error


def _queue() -> _Queue:
    """The user's jobs that are queued or running, from one call of squeue.

    Raises:
        FuselineError: Slurm does not answer.
    """
    command = ["squeue", "--array", "--noheader", f"--user={getpass.getuser()}", "--format=%K %j"]
    for wait in (1, 10, 60, 0):  # a controller may be restarting
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            break
        time.sleep(wait)
    else:
        raise FuselineError(f"squeue fails: {result.stderr.strip()}. Run the same command again to follow the jobs. They keep running.")
    found: _Queue = {}
    for line in result.stdout.splitlines():
        index, _, name = line.strip().partition(" ")
        found.setdefault(name, set()).add(int(index) if index.isdigit() else 0)
    return found


def _hopeful_first(parts: Iterable[int], jobs: Sequence[_Job]) -> list[int]:
    """Sort parts by how many tasks died with them, fewest first. A part that kills its task then stops no other part."""
    deaths = _interrupted([state for job in jobs for state in journal.read_journals(job.run_folder)])
    return sorted(parts, key=lambda part: (deaths[part], part))


def _interrupted(states: Iterable[journal.WorkerState]) -> Counter[int]:
    """How often a worker died or was requeued while it worked on each part. An unfinished part of an ended task counts once more."""
    return sum((state.interrupted + Counter(state.unfinished) for state in states), Counter())
