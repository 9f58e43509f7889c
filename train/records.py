"""The small files of a run folder, except those in its checkpoints. Imports neither torch nor Megatron-core.

job.json            what to train (config.TrainJob)
machine.json        the number format of the run's computation, its dtype, and the threads of a rank at its latest start
metrics.jsonl       one record per optimizer step
evaluations.jsonl   one record per evaluation of held-out text and domain
checkpoints/step-00000010/    with its own machine.json
checkpoints/latest  a link to the newest
done.json           the run is finished and its model is exported
logs/               the output of the ranks
tensorboard/        the metrics as events
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..store import durable
from ..store.errors import DamagedPart, FingerprintMismatch, reason_of
from ..store.fingerprint import differences
from ..store.json_files import Facts, read_object
from ..store.machine import arithmetic_for, threads
from ..store.trainings import EVALUATIONS, MACHINE, METRICS, checkpoint_folder, checkpoint_steps, read_machine, read_records

Record = dict[str, Any]
LATEST = "latest"  # for people and scripts; the trainer lists the checkpoints
RECORD_FILES = (METRICS, EVALUATIONS)


def last_checkpoint(run_folder: Path) -> int | None:
    """Step of the newest complete checkpoint."""
    return max(checkpoint_steps(run_folder), default=None)


def cut(path: Path, *, step: int) -> None:
    """Remove a file's records after `step`: a resumed run writes them again. The file is always replaced, which a follower can detect."""
    kept = [record for record in read_records(path) if record["step"] <= step]
    temporary = durable.temporary_sibling(path)
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    durable.publish(temporary, to=path)


def read_done(run_folder: Path) -> Record | None:
    """`done.json`, if the run is finished.

    Raises:
        DamagedPart: it cannot be read.
    """
    path = run_folder / "done.json"
    try:
        record = read_object(path)
        identity = record["identity"]
        if not isinstance(identity, dict) or not isinstance(identity.get("config", {}), dict):
            raise ValueError("identity must be an object, and its config one")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        remedy = "Remove it and run the recipe again: the training then continues from its last checkpoint."
        raise DamagedPart(f"{path} cannot be read ({reason_of(error)}).", remedy=remedy) from error
    return {**record, "identity": Facts(identity, path=path, what="identity", remedy=f"Remove {run_folder} to train again.")}


def arithmetic_of(run_folder: Path, *, dtype: str) -> str:
    """The number format of a run's computation: from its newest checkpoint, or from `machine.json` if the run was begun with `dtype`.

    Else it is the fastest for `dtype` on this machine; but a checkpoint of an earlier version, without a record, was computed in `dtype`.
    """
    step = last_checkpoint(run_folder)
    folders = [run_folder] if step is None else [checkpoint_folder(run_folder, step=step), run_folder]
    said = [machine for machine in map(read_machine, folders) if machine is not None and _is_of(machine, dtype=dtype)]
    if said:
        return str(said[0]["arithmetic"])
    return arithmetic_for(dtype) if step is None else dtype


def _is_of(machine: Record, *, dtype: str) -> bool:
    """Whether it is a valid record for a training in `dtype`; it may be damaged, or the dtype of a run without checkpoints was changed."""
    return machine.get("dtype", dtype) == dtype and machine.get("arithmetic") in (dtype, "float32")


def write_machine(folder: Path, *, dtype: str, arithmetic: str) -> None:
    """Write the number format of a run or a checkpoint in `dtype`, and the number of threads of this rank."""
    durable.write_json(folder / MACHINE, {"dtype": dtype, "arithmetic": arithmetic, "threads": threads()})


def require_identity(run_folder: Path, *, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise FingerprintMismatch, naming each difference, unless the run folder was begun for the same training."""
    changed = differences(stored, asked)
    if changed:
        lines = "\n  ".join(changed)
        raise FingerprintMismatch(
            f"{run_folder} holds a run with different settings:\n  {lines}\nRename the training, or remove that folder to start again."
        )


def figures(record: Record) -> str:
    """A step's record in one line."""
    terms = "" if record["fusion_loss"] is None else f" (text {record['clm_loss']:.4f}, fused {record['fusion_loss']:.4f})"
    seconds = record["tokens"] / record["tokens_per_second"]
    found = [
        f"step {record['step']}/{record['steps']}",
        f"loss {record['loss']:.4f}{terms}",
        f"learning rate {record['learning_rate']:.2e}",
        f"{record['tokens_per_second']:,.0f} tokens/s",
    ]
    if record["mfu"] is not None:
        found.append(f"MFU {record['mfu']:.0%}")
    found.append(f"data wait {record['data_wait_seconds'] / seconds:.0%}")
    if record["held_out_bpb"] is not None:
        found.append(f"held out {record['held_out_bpb']:.4f} bits per byte")
    return ", ".join(found)
