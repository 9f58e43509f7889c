"""What a training leaves in its run folder for others to read: the records of its steps, and its checkpoints."""

import json
from pathlib import Path
from typing import Any

from . import durable
from .checksums import size_and_crc
from .workspace import Workspace

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
MACHINE = "machine.json"


def training_folders(workspace: Workspace) -> list[Path]:
    """The run folders of all trainings that were begun, by name."""
    return sorted(path.parent for path in (workspace.root / "runs").glob("*/job.json"))


def text_only(workspace: Workspace) -> list[str]:
    """Names of the trainings that learn from the text alone, the baselines of the others."""
    jobs = {folder.name: json.loads((folder / "job.json").read_text(encoding="utf-8"))["config"] for folder in training_folders(workspace)}
    return [name for name, config in jobs.items() if config["clm_weight"] == 1 and config.get("clm_weight_end") in (None, 1)]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file with one on each line; one that a crash cut short is left out."""
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")] if path.exists() else []


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`, one per optimizer step."""
    return read_records(run_folder / METRICS)


def read_evaluations(run_folder: Path) -> list[dict[str, Any]]:
    """The records of `evaluations.jsonl`, one per evaluation and domain; step 0 is the start."""
    return read_records(run_folder / EVALUATIONS)


def read_machine(folder: Path) -> dict[str, Any] | None:
    """What a run, or a checkpoint by its folder, is computed in: `dtype`, `arithmetic` (a number format), and `threads` (of a rank).

    None where it was not written, or is damaged: of a checkpoint its checksums tell that.
    """
    try:
        found = json.loads((folder / MACHINE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def seal_checkpoint(folder: Path, *, share: int = 0, shares: int = 1) -> None:
    """Write down sizes and CRC-32 of a checkpoint's files; of every `shares`-th of them, if several processes share the work."""
    files = {path.name: size_and_crc(path) for path in _checkpoint_files(folder)[share::shares]}
    durable.write_json(folder / f"checksums-{share}.json", files)


def checkpoint_damage(folder: Path, *, share: int = 0, shares: int = 1, full: bool = True) -> str | None:
    """What is wrong with a checkpoint's files, if anything; with `full` their contents are read. `share` as in `seal_checkpoint`."""
    try:
        sealed = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("checksums-*.json")]
        expected = {name: tuple(facts) for files in sealed for name, facts in files.items()}
        if not expected:
            return "its checksums are missing"
        for name in sorted(expected)[share::shares]:
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected[name][0]:
                return f"{name} has {path.stat().st_size} bytes, and had {expected[name][0]}"
            if full and size_and_crc(path) != expected[name]:
                return f"{name} is not what was written"
    except (OSError, ValueError, TypeError, AttributeError, IndexError) as error:
        return f"its checksums cannot be read: {error}"
    return None


def _checkpoint_files(folder: Path) -> list[Path]:
    """All but checksums, also those that another process is writing."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(("checksums-", durable.TEMPORARY)))


def checkpoint_folder(run_folder: Path, *, step: int) -> Path:
    """Where the checkpoint after `step` steps is."""
    return run_folder / "checkpoints" / f"step-{step:08d}"


def checkpoint_steps(run_folder: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run_folder / "checkpoints").glob("step-*"))
