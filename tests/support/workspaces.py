"""Runs the command line as a user does, and compares what it leaves behind."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
from click.testing import CliRunner
from fuseline.cli import main
from fuseline.store.dataset import Dataset
from fuseline.store.workspace import Workspace

RECIPE = """
[corpus]
path = "corpus.parquet"
domain_column = "domain"
split_column = "split"
context_length = 128
part_bytes = 4096

[target]
name = "target"
model = "tiny-target"
dtype = "float32"

[[sources]]
name = "source"
model = "tiny-source"
dtype = "float32"

[training]
sequence_length = 128
global_batch_size = 4
learning_rate = 1e-3
warmup_fraction = 0.1
steps = 24
checkpoint_every = 4
evaluate_every = 24
clm_weight = 0.9
"""


def write_project(folder: Path, *, texts: list[str], recipe: str = RECIPE) -> Path:
    """A recipe and its corpus: 40 documents of about 1 kB to train on, 6 to test on, 2 to validate on."""
    documents = list(dict.fromkeys(text[:1000] for text in texts))[:48]
    columns = {
        "text": documents,
        "domain": [("even", "odd")[index % 2] for index in range(len(documents))],
        "split": ["train"] * 40 + ["test"] * 6 + ["validation"] * 2,
    }
    folder.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(columns).write_parquet(folder / "corpus.parquet")
    (folder / "recipe.toml").write_text(recipe)
    return folder / "recipe.toml"


def run(*arguments: object) -> tuple[int, str]:
    """Run `fuseline` in this process: its exit code and all that it prints. An error that is none of a user's fails the test."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.output


def start(*arguments: object, log: Path | None = None) -> subprocess.Popen:
    """Start `fuseline` in a process group of its own, its output in a file (a pipe could be held open by an orphan)."""
    with (log or Path(os.devnull)).open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "fuseline", *map(str, arguments)], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def kill_group(process: subprocess.Popen) -> None:
    """SIGKILL to the process and all that it started in its group."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(condition: Callable[[], bool], *, process: subprocess.Popen, seconds: float = 120) -> None:
    """Poll until something is there; fails if the process ends first."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode} before it could be interrupted"
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.002)


def contents(root: Path) -> dict[str, object]:
    """All that must be the same after any number of interruptions: arrays and tables, loss sequences, exported weights."""
    found: dict[str, object] = {}
    workspace = Workspace.open(root)
    for dataset in workspace.datasets():
        for part in dataset.parts():
            found[f"{dataset.kind}/{dataset.name}/{part}"] = _part(dataset, part)
    for path in sorted((root / "runs").glob("*/metrics.jsonl")):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        found[f"metrics/{path.parent.name}"] = [
            {name: value for name, value in record.items() if "second" not in name and "memory" not in name} for record in records
        ]
        found[f"evaluations/{path.parent.name}"] = (path.parent / "evaluations.jsonl").read_text()
    for path in sorted((root / "exports").glob("*/*.safetensors")):
        found[f"exports/{path.parent.name}/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _part(dataset: Dataset, part: int) -> object:
    if dataset.manifest(part).payload.endswith(".parquet"):
        return dataset.table(part).rows()
    names = dataset.arrays(part).names
    arrays = dataset.read(part, *names)
    return [
        (name, array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).hexdigest()) for name, array in zip(names, arrays, strict=True)
    ]
