"""What a workspace holds and lacks, read from the files: also correct while a stage runs and the catalog is out of date."""

import fcntl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any

from .corpus_plan import read_plan
from .journal import WorkerState, read_journals
from .json_files import open_file
from .layout import Layout
from .manifest import Manifest
from .trainings import checkpoint_steps, read_machine, read_metrics, training_folders

_RECENT_SECONDS = 1800.0  # over which the rate of workers is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetStatus:
    """The progress of one dataset."""

    kind: str
    name: str
    parts: int
    expected_parts: int | None  # None if it is not planned yet
    workers: int  # that work on it, on all machines
    running_parts: list[int]  # that are being computed or written
    failed_parts: list[int]  # whose last attempt failed
    tokens: int
    stored_bytes: int
    tokens_per_second: float | None  # of all workers together, recently; without workers, of one process
    seconds_left: float | None  # at that rate
    left_out: int  # documents in quarantine
    arithmetic: str | None  # number format of the forward passes; None if there are none
    threads: int | None  # of the process that made the latest part; None if an earlier version made it


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStatus:
    """The progress of one training."""

    name: str
    step: int
    steps: int | None  # None before the first step
    loss: float | None
    seconds_left: float | None
    last_checkpoint: int | None  # step
    running: bool
    done: bool
    arithmetic: str | None  # number format of the computation; None before the first step, and for runs of earlier versions
    threads: int | None  # of a rank, at its latest start


def dataset_statuses(layout: Layout) -> list[DatasetStatus]:
    """Every dataset of the layout, in the order of the pipeline."""
    plans = {dataset.name: read_plan(dataset.folder) for dataset in layout.datasets() if dataset.kind == "corpus"}
    splits_of = {name: [part["split"] for part in plan["parts"]] for name, plan in plans.items() if plan}
    states_of = _worker_states(layout)
    statuses = []
    for dataset in layout.datasets():
        manifests = [dataset.manifest(part) for part in dataset.parts()]
        expected: int | None
        match dataset.kind:
            case "corpus":
                expected = len(splits_of[dataset.name]) if dataset.name in splits_of else None
            case _ if "corpus" not in dataset.description:
                expected = 1
            case _:
                facts = dataset.description
                expected = splits_of.get(facts["corpus"], []).count(facts.get("split", "train"))
        there = {manifest.part for manifest in manifests}
        states = states_of.get((dataset.kind, dataset.name), [])
        alive = [state for state in states if state.is_alive]
        running = {part for state in alive for part in state.unfinished} - there
        rates = _rates(manifests, alive=alive)
        statuses.append(
            DatasetStatus(
                kind=dataset.kind,
                name=dataset.name,
                parts=len(manifests),
                expected_parts=expected,
                workers=len(alive),
                running_parts=sorted(running),
                failed_parts=sorted({part for state in states for part in state.failed} - there - running),
                tokens=sum(manifest.counts.get("tokens", 0) for manifest in manifests),
                stored_bytes=sum(manifest.n_bytes for manifest in manifests),
                tokens_per_second=rates.tokens_per_second or None if rates else None,
                seconds_left=None if expected is None or rates is None else (expected - len(manifests)) / rates.parts_per_second,
                left_out=sum(manifest.counts.get("quarantined", 0) for manifest in manifests),
                arithmetic=dataset.description.get("arithmetic", dataset.identity.get("dtype")),
                threads=_latest(manifests).get("threads"),
            )
        )
    return statuses


def _latest(manifests: Sequence[Manifest]) -> dict[str, Any]:
    """The producer of the latest part."""
    return max((manifest.producer for manifest in manifests), key=itemgetter("committed_at"), default={})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rates:
    parts_per_second: float
    tokens_per_second: float


def _rates(manifests: Sequence[Manifest], *, alive: Sequence[WorkerState]) -> _Rates | None:
    """How fast parts appear: the rate of the workers since they started, or else their expected rate."""
    if alive:
        now = time.time()
        since = max(min(state.started_at for state in alive), now - _RECENT_SECONDS)
        recent = [manifest for manifest in manifests if manifest.producer["committed_at"] >= since]
        if recent:
            return _over(recent, seconds=now - since)
    return _over(manifests, seconds=sum(manifest.producer["seconds"] for manifest in manifests) / max(len(alive), 1))


def _over(manifests: Sequence[Manifest], *, seconds: float) -> _Rates | None:
    if not manifests or seconds <= 0:
        return None
    tokens = sum(manifest.counts.get("tokens", 0) for manifest in manifests)
    return _Rates(parts_per_second=len(manifests) / seconds, tokens_per_second=tokens / seconds)


def _worker_states(layout: Layout) -> dict[tuple[str, str], list[WorkerState]]:
    """The workers' states, by kind and name of their dataset; finished runs are left out."""
    found: dict[tuple[str, str], list[WorkerState]] = {}
    for run in layout.runs():
        if run["status"] != "done":
            found.setdefault((run["stage"], run["dataset"]), []).extend(read_journals(layout.folder("runs", run["run"])))
    return found


def training_statuses(layout: Layout) -> list[TrainingStatus]:
    """Every training that has begun."""
    statuses = []
    for folder in training_folders(layout):
        records = read_metrics(folder)
        last = records[-1] if records else {}
        machine = read_machine(folder) or {}
        lately = [record for record in records[-50:] if record.get("tokens") and record.get("tokens_per_second")]
        per_step = median(record["tokens"] / record["tokens_per_second"] for record in lately) if lately else None
        statuses.append(
            TrainingStatus(
                name=folder.name,
                step=last.get("step", 0),
                steps=last.get("steps"),
                loss=last.get("loss"),
                seconds_left=None if per_step is None or not last.get("steps") else per_step * (last["steps"] - last["step"]),
                last_checkpoint=max(checkpoint_steps(folder), default=None),
                running=_is_locked(folder / ".lock"),
                done=(folder / "done.json").exists(),
                arithmetic=machine.get("arithmetic"),
                threads=machine.get("threads"),
            )
        )
    return statuses


def _is_locked(path: Path) -> bool:
    """Whether a trainer holds the lock of its run folder."""
    try:
        file = open_file(path)
    except OSError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
