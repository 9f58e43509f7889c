"""Names of a recipe under which the workspace has something else already: told all at once, with names that are free.

Targets and trainings depend on everything before them. With one more source, or another target, they are others than before, while what is
stored of each model, and its alignment, stays as it is and is used again.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..store.dataset import Dataset
from ..store.errors import FingerprintMismatch
from ..store.fingerprint import differences
from ..store.workspace import Workspace
from ..train.config import TrainJob
from ..train.records import last_checkpoint, read_done

_COMPONENTS = ("distributions", "alignment", "vocabulary map")  # of a source of fused targets, as its identity lists them
_LONG_DIGEST = re.compile(r'"([0-9a-f]{12})[0-9a-f]{52}"')


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """One name that is taken."""

    key: tuple[str, str]  # section and key of the recipe that give the name
    name: str  # that they give; what is made with it may have a longer one
    what: str  # has this name: `targets/fused`, `training fused`
    folders: Sequence[Path]  # that hold it
    differences: Sequence[str]  # between what is there and what the recipe asks for


def require_free(conflicts: Sequence[Conflict], *, workspace: Workspace) -> None:
    """Raise what is taken, if anything is.

    Raises:
        FingerprintMismatch: with each difference, and a name for each that nothing has.
    """
    if not conflicts:
        return
    lines = ["The workspace has something else under names of the recipe:"]
    for conflict in conflicts:
        lines += [f"  {conflict.what}", *(f"    {_short(line)}" for line in conflict.differences)]
    lines.append("What is stored of each model, and its alignment, is used again. Give what is new names of its own, in the recipe:")
    for (section, key), name in {conflict.key: conflict.name for conflict in conflicts}.items():
        lines += [f"  [{section}]", f'  {key} = "{_free_name(name, workspace=workspace)}"']
    folders = " ".join(str(folder) for conflict in conflicts for folder in conflict.folders if folder.exists())
    lines.append(f"To make it in place of what is there, remove first: {folders}")
    raise FingerprintMismatch("\n".join(lines))


def fusion_conflicts(workspace: Workspace, *, name: str, identity: Mapping[str, Any], recipe_name: str) -> list[Conflict]:
    """Whether the targets of this name are of another identity. `recipe_name` is the fusion's in the recipe."""
    folder = workspace.folder("targets", name)
    if not (folder / "dataset.json").exists():
        return []
    found = _fusion_differences(Dataset.open(folder).identity, identity, workspace=workspace)
    key, what = ("fusion", "name"), f"targets/{name}"
    return [Conflict(key=key, name=recipe_name, what=what, folders=[folder], differences=found)] if found else []


def training_conflicts(job: TrainJob, *, key: tuple[str, str], recipe_name: str) -> list[Conflict]:
    """Whether a training of this name that is finished, or has checkpoints, is another one. `key` and `recipe_name` as of `Conflict`."""
    done, name = read_done(job.run_folder), job.config.name
    if done is not None:
        stored = done["identity"]
    elif (job.run_folder / "job.json").exists() and last_checkpoint(job.run_folder) is not None:
        stored = TrainJob.load(job.run_folder).identity
    else:
        return []
    found, folders = differences(stored, job.identity), [job.run_folder, job.export_folder]
    return [Conflict(key=key, name=recipe_name, what=f"training {name}", folders=folders, differences=found)] if found else []


def _fusion_differences(stored: Mapping[str, Any], asked: Mapping[str, Any], *, workspace: Workspace) -> list[str]:
    names = {dataset.fingerprint: dataset.name for dataset in workspace.datasets() if dataset.kind == "distributions"}
    were, are = ([names.get(parts[0], f"one that is gone ({parts[0][:12]}…)") for parts in each["sources"]] for each in (stored, asked))
    if were != are:
        lines = [f"sources: stored {', '.join(were)}; asked for {', '.join(are)}"]
    else:
        lines = []
        for name, was, now in zip(are, stored["sources"], asked["sources"], strict=True):
            changed = [what for what, before, after in zip(_COMPONENTS, was, now, strict=False) if before != after]
            lines += [f"sources: {name} has another {' and '.join(changed)} than it had"] if changed else []
    rest = [{key: value for key, value in identity.items() if key != "sources"} for identity in (stored, asked)]
    return lines + differences(*rest)


def _short(line: str) -> str:
    return _LONG_DIGEST.sub(r"\1…", line)


def _free_name(name: str, *, workspace: Workspace) -> str:
    """The name with the first number from 2 with which nothing begins: what is made for one source, or for all, is named `<name>-…`."""
    stem = re.sub(r"-\d+$", "", name)
    taken = [path.name for kind in ("targets", "runs", "exports") for path in (workspace.root / kind).glob("*")]
    numbered = (f"{stem}-{n}" for n in itertools.count(2))
    return next(free for free in numbered if not any(f"{other}-".startswith(f"{free}-") for other in taken))
