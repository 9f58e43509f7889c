"""What a training leaves in its run folder for others to read: the records of its steps, and its checkpoints."""

import json
from pathlib import Path
from typing import Any

from .workspace import Workspace

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"


def training_folders(workspace: Workspace) -> list[Path]:
    """The run folders of all trainings that were begun, by name."""
    return sorted(path.parent for path in (workspace.root / "runs").glob("*/job.json"))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file with one on each line; one that a crash cut short is left out."""
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")] if path.exists() else []


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`, one per optimizer step."""
    return read_records(run_folder / METRICS)


def read_evaluations(run_folder: Path) -> list[dict[str, Any]]:
    """The records of `evaluations.jsonl`, one per evaluation and domain; step 0 is the start."""
    return read_records(run_folder / EVALUATIONS)


def checkpoint_steps(run_folder: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run_folder / "checkpoints").glob("step-*"))
