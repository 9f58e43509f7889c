"""Reads a training's run folder: the records of its steps, and its checkpoints."""

import math
import re
from pathlib import Path
from typing import Any

from . import durable
from .checksums import size_and_crc
from .errors import DamagedPart, reason_of
from .inside import inside
from .json_files import decode_json, is_count, is_number, read_lines, read_object
from .layout import Layout
from .shown import shown

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
MACHINE = "machine.json"

_CHECKPOINT = re.compile(r"step-(?P<step>\d{8,15})")
_MOST_STEPS = 10**15
# The fields of records that other code uses; other fields may have any type.
_TEXTS = frozenset({"domain", "warning"})
_COUNTS = frozenset({"steps", "peak_memory_bytes", "n_scored", "scored_bytes"})
_NEEDED = frozenset({"tokens", "tokens_per_second"})  # for the remaining time
_FIGURES = frozenset(
    {
        "loss",
        "clm_loss",
        "fusion_loss",
        "grad_norm",
        "learning_rate",
        "data_wait_seconds",
        "clm_weight",
        "held_out_bpb",
        "mfu",
        "nll",
        "bpb",
    }
)


def training_folders(layout: Layout) -> list[Path]:
    """The run folders of all trainings that have begun, by name."""
    return sorted(path.parent for path in (layout.root / "runs").glob("*/job.json"))


def text_only(layout: Layout) -> list[str]:
    """Names of the trainings on text alone, which are the baselines for the others."""
    jobs = {folder.name: read_job(folder / "job.json") for folder in training_folders(layout)}
    return [name for name, config in jobs.items() if config["clm_weight"] == 1 and config.get("clm_weight_end") in (None, 1)]


def read_job(path: Path) -> dict[str, Any]:
    """The settings of a training, from its `job.json`.

    Raises:
        DamagedPart: they cannot be read.
    """
    try:
        config = read_object(path)["config"]
        config["clm_weight"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "Run the recipe again, which writes it again."
        raise DamagedPart(f"{path} cannot be read ({reason_of(error)}).", remedy=remedy) from error
    return config


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file with one per line. A last record that a crash cut short is left out.

    Raises:
        DamagedPart: a record cannot be read.
    """
    found: list[dict[str, Any]] = []
    try:
        for line in read_lines(path):
            record = decode_json(line)
            _check_record(record)
            found.append(record)
    except (OSError, ValueError) as error:
        remedy = f"Remove the line, or {path.parent} to start the training over."
        raise DamagedPart(f"{path}, line {len(found) + 1}, cannot be read ({reason_of(error)}).", remedy=remedy) from error
    return found


def _check_record(record: Any) -> None:
    """Raise ValueError unless a line is the record of a step or an evaluation; its figures may be any numbers."""
    if not isinstance(record, dict) or not is_count(record.get("step"), below=_MOST_STEPS):
        raise ValueError("it must hold an object with a step")
    for name, value in record.items():
        if name in _TEXTS and not isinstance(value, str | None):
            raise ValueError(f"{name} ({shown(value)}) must be a text")
        if name in _COUNTS and value is not None and not is_count(value):
            raise ValueError(f"{name} ({shown(value)}) must be a whole number from 0")
        if name in _FIGURES and type(value) not in (int, float, type(None)):
            raise ValueError(f"{name} ({shown(value)}) must be a number")
        if name in _NEEDED and not is_number(value or 0, below=math.inf):
            raise ValueError(f"{name} ({shown(value)}) must be a number from 0")


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`, one per optimizer step."""
    return read_records(run_folder / METRICS)


def read_evaluations(run_folder: Path) -> list[dict[str, Any]]:
    """The records of `evaluations.jsonl`, one per evaluation and domain; step 0 is the starting model."""
    return read_records(run_folder / EVALUATIONS)


def read_machine(folder: Path) -> dict[str, Any] | None:
    """How a run, or the checkpoint in a folder, is computed: `dtype`, `arithmetic` (a number format), and `threads` (of a rank).

    None if the file is missing or damaged; the checksums of a checkpoint detect damage.
    """
    try:
        found = read_object(folder / MACHINE)
    except (OSError, ValueError):
        return None
    is_right = isinstance(found.get("arithmetic"), str | None) and is_count(found.get("threads") or 0)
    return found if is_right else None


def seal_checkpoint(folder: Path, *, share: int = 0, shares: int = 1) -> None:
    """Write sizes and CRC-32 of a checkpoint's files; only of every `shares`-th file if several processes share the work."""
    files = {path.name: size_and_crc(path) for path in _checkpoint_files(folder)[share::shares]}
    durable.write_json(folder / f"checksums-{share}.json", files)


def checkpoint_damage(folder: Path, *, share: int = 0, shares: int = 1, full: bool = True) -> str | None:
    """The problem of a checkpoint's files, if any; with `full` their contents are read. `share` as in `seal_checkpoint`."""
    try:
        sealed = [read_object(path) for path in folder.glob("checksums-*.json")]
        expected = {name: tuple(facts) for files in sealed for name, facts in files.items()}
        if not expected:
            return "its checksums are missing"
        unlisted = sorted({path.name for path in _checkpoint_files(folder)} - expected.keys())
        if unlisted:
            return f"{unlisted[0]} is not in its checksums"
        for name in sorted(expected)[share::shares]:
            path = inside(folder, name, what="a name in its checksums")
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected[name][0]:
                return f"{name} has {path.stat().st_size} bytes, but had {expected[name][0]}"
            if full and size_and_crc(path) != expected[name]:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, TypeError, AttributeError, IndexError) as error:
        return f"its checksums cannot be read: {reason_of(error)}"
    return None


def _checkpoint_files(folder: Path) -> list[Path]:
    """All files except checksums, including files that another process is writing."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(("checksums-", durable.TEMPORARY)))


def checkpoint_folder(run_folder: Path, *, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return run_folder / "checkpoints" / f"step-{step:08d}"


def checkpoint_steps(run_folder: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    found = [(_CHECKPOINT.fullmatch(path.name), path) for path in (run_folder / "checkpoints").glob("step-*")]
    return sorted(int(name["step"]) for name, path in found if name is not None and path.is_dir())
