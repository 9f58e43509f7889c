"""What a workspace holds and lacks, read from the files themselves: true also while a stage runs and the catalog lags behind."""

import fcntl
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from .trainings import checkpoint_steps, read_metrics, training_folders
from .workspace import Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetStatus:
    """How far one dataset is."""

    kind: str
    name: str
    parts: int
    expected_parts: int | None  # None where nobody has planned it yet
    tokens: int
    stored_bytes: int
    tokens_per_second: float | None  # of computing, over all parts
    seconds_left: float | None  # at that rate, in one process
    left_out: int  # documents in quarantine


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStatus:
    """How far one training is."""

    name: str
    step: int
    steps: int | None  # None before the first step
    loss: float | None
    seconds_left: float | None
    last_checkpoint: int | None  # step
    running: bool
    done: bool


def dataset_statuses(workspace: Workspace) -> list[DatasetStatus]:
    """Every dataset of the workspace, in the order of the pipeline."""
    splits_of = {
        dataset.name: [part["split"] for part in json.loads((dataset.folder / "plan.json").read_text(encoding="utf-8"))["parts"]]
        for dataset in workspace.datasets()
        if (dataset.folder / "plan.json").exists()
    }
    statuses = []
    for dataset in workspace.datasets():
        manifests = [dataset.manifest(part) for part in dataset.parts()]
        expected: int | None
        match dataset.kind:
            case "corpus":
                expected = len(splits_of[dataset.name]) if dataset.name in splits_of else None
            case "vocab_maps":
                expected = 1
            case _:
                facts = dataset.description
                expected = splits_of.get(facts["corpus"], []).count(facts.get("split", "train"))
        tokens = sum(manifest.counts.get("tokens", 0) for manifest in manifests)
        seconds = sum(manifest.producer["seconds"] for manifest in manifests)
        left = None if expected is None or not manifests else (expected - len(manifests)) * seconds / len(manifests)
        statuses.append(
            DatasetStatus(
                kind=dataset.kind,
                name=dataset.name,
                parts=len(manifests),
                expected_parts=expected,
                tokens=tokens,
                stored_bytes=sum(manifest.n_bytes for manifest in manifests),
                tokens_per_second=tokens / seconds if tokens and seconds else None,
                seconds_left=left,
                left_out=sum(manifest.counts.get("quarantined", 0) for manifest in manifests),
            )
        )
    return statuses


def training_statuses(workspace: Workspace) -> list[TrainingStatus]:
    """Every training that was begun."""
    statuses = []
    for folder in training_folders(workspace):
        records = read_metrics(folder)
        last = records[-1] if records else {}
        per_step = median(record["tokens"] / record["tokens_per_second"] for record in records[-50:]) if records else None
        statuses.append(
            TrainingStatus(
                name=folder.name,
                step=last.get("step", 0),
                steps=last.get("steps"),
                loss=last.get("loss"),
                seconds_left=None if per_step is None else per_step * (last["steps"] - last["step"]),
                last_checkpoint=max(checkpoint_steps(folder), default=None),
                running=_is_locked(folder / ".lock"),
                done=(folder / "done.json").exists(),
            )
        )
    return statuses


def _is_locked(path: Path) -> bool:
    """Whether a trainer holds the lock of its run folder."""
    if not path.exists():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
