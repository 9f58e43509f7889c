"""Finds every damaged, missing or foreign file of a workspace, with its path and what to do about it.

It only reads, without the coordinator's lock, and can run beside other stages: a part that is being committed has no manifest yet and is
skipped. The catalog is read before the parts, so every part that it lists must exist.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from . import catalog
from .content import check_content, check_tokenizer_table
from .corpus_plan import read_documents, read_plan
from .dataset import Dataset
from .errors import DamagedPart, FuselineError, NewerPart, WorkspaceBusy
from .json_files import open_file, read_object
from .layout import folders_in, read_run
from .lineage import check_counts, check_inputs
from .manifest import Manifest
from .remedy import rebuild, remake, remake_part
from .tokenizer import tokenizer_digest
from .trainings import (
    EVALUATIONS,
    METRICS,
    checkpoint_damage,
    checkpoint_folder,
    checkpoint_steps,
    read_job,
    read_records,
    training_folders,
)
from .workspace import Workspace

PartName = tuple[str, str, int]  # kind and name of the dataset, index of the part


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong."""

    path: Path
    problem: str
    remedy: str
    part: PartName | None = None  # the part to make again
    repair: Literal["remake", "remove", "by hand"] = "by hand"  # `remove`: the file is made again when it is absent


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was checked, and the problems that were found."""

    datasets: int
    parts: int
    n_bytes: int  # of the parts' payloads
    findings: list[Finding]

    @property
    def lost_parts(self) -> set[PartName]:
        """The parts to make again."""
        return {finding.part for finding in self.findings if finding.part is not None and finding.repair == "remake"}


def verify(workspace: Workspace, *, full: bool = False) -> Verification:
    """Check everything that stages have stored.

    Args:
        workspace: the workspace.
        full: also read everything: checksums of all files, contents of all arrays, texts. Otherwise check manifests, sizes, metadata, and
        that datasets fit together.
    """
    findings = list(_check_catalog(workspace, full=full))
    known = set() if findings else _known_parts(workspace)
    datasets, parts, n_bytes = [], 0, 0
    for folder in _dataset_folders(workspace):
        try:
            dataset = Dataset.open(folder)
        except DamagedPart as error:
            findings.append(_finding(folder / "dataset.json", error))
            continue
        datasets.append(dataset)
        gone = {part for kind, name, part in known if (kind, name) == (dataset.kind, dataset.name)} - set(dataset.parts())
        findings += [_gone(dataset, part) for part in sorted(gone)]
        if dataset.kind == "corpus":
            findings += _check_plan(dataset)
        for part in dataset.parts():
            found = list(_check_part(dataset, part, full=full))
            if found and not os.path.lexists(dataset.manifest_path(part)):
                continue  # a repair has removed it in the meantime
            findings += found
            parts += 1
            n_bytes += 0 if found else dataset.manifest(part).n_bytes
    sound = [dataset for dataset in datasets if not any(finding.part and finding.part[:2] == _key(dataset) for finding in findings)]
    findings += [
        Finding(path=dataset.folder / "dataset.json", problem=problem, remedy=remedy)
        for dataset, problem, remedy in check_inputs(datasets, tokenizers={folder.name for folder in workspace.tokenizer_folders()})
    ]
    findings += [_damaged(dataset, part, problem) for dataset, part, problem in check_counts(sound)]
    for folder in workspace.tokenizer_folders():
        findings += _check_tokenizer(folder, full=full)
    findings += _check_runs(workspace)
    findings += _check_checkpoints(workspace, full=full)
    if (workspace.root / "repair.json").exists():
        problem = "a repair is running or was interrupted: it has not yet made again the parts that it set aside"
        findings.append(Finding(path=workspace.root / "repair.json", problem=problem, remedy="If it was interrupted, run it again."))
    findings.sort(key=lambda finding: finding.path)
    return Verification(datasets=len(datasets), parts=parts, n_bytes=n_bytes, findings=findings)


def _dataset_folders(workspace: Workspace) -> Iterator[Path]:
    for kind in reversed(workspace.kinds()):  # inputs exist before their products, also during a run
        for folder in folders_in(workspace.root / kind):
            if os.path.lexists(folder / "dataset.json") or any(folder.glob("part-*.json")):
                yield folder


def _check_catalog(workspace: Workspace, *, full: bool) -> Iterator[Finding]:
    if not workspace.catalog_path.exists():
        if any(_dataset_folders(workspace)):
            yield Finding(path=workspace.catalog_path, problem="is missing", remedy=rebuild(workspace.root), repair="remove")
        return
    try:
        catalog.read_all(workspace) if full else catalog.known_parts(workspace)
    except WorkspaceBusy:
        return
    except FuselineError as error:
        yield Finding(
            path=workspace.catalog_path,
            problem=error.problem.split("\n")[0].removeprefix(f"{workspace.catalog_path} "),
            remedy=rebuild(workspace.root),
            repair="remove",
        )


def _known_parts(workspace: Workspace) -> set[PartName]:
    """The parts that the catalog lists; none while the coordinator writes it."""
    try:
        return catalog.known_parts(workspace) if workspace.catalog_path.exists() else set()
    except WorkspaceBusy:
        return set()


def _check_plan(dataset: Dataset) -> Iterator[Finding]:
    path = dataset.folder / "plan.json"
    try:
        summary = read_plan(dataset.folder)
        if summary is not None:
            read_documents(dataset.folder, summary=summary)
        elif dataset.parts():
            raise DamagedPart("is missing, but the corpus has parts")
    except DamagedPart as error:
        yield _finding(path, error, repair="remove")
        return
    n_parts = len(summary["parts"]) if summary else 0
    for part in dataset.parts():
        if part >= n_parts:
            manifest = dataset.manifest_path(part)
            yield Finding(path=manifest, problem=f"is not in the plan, which has {n_parts} parts", remedy=f"Remove {manifest}.")


def _check_part(dataset: Dataset, part: int, *, full: bool) -> Iterator[Finding]:
    """At most one finding: one problem is enough to make a part again."""
    try:
        manifest = dataset.manifest(part)
        _check_files(dataset, manifest=manifest, full=full)
        if full:
            check_content(dataset, part)
    except FuselineError as error:
        repair: Literal["by hand", "remake"] = "by hand" if isinstance(error, NewerPart) else "remake"
        yield _finding(dataset.manifest_path(part), error, part=(*_key(dataset), part), repair=repair)


def _check_runs(workspace: Workspace) -> Iterator[Finding]:
    readers: list[tuple[Path, Callable[[Path], object]]] = [(path, read_run) for path in workspace.run_files()]
    for folder in training_folders(workspace):
        readers += [(folder / "job.json", read_job)]
        readers += [(folder / name, read_records) for name in (METRICS, EVALUATIONS)]
    for path, read in readers:
        try:
            read(path)
        except DamagedPart as error:
            yield _finding(path, error)


def _check_checkpoints(workspace: Workspace, *, full: bool) -> Iterator[Finding]:
    for run_folder in training_folders(workspace):
        for step in checkpoint_steps(run_folder):
            folder = checkpoint_folder(run_folder, step=step)
            damage = checkpoint_damage(folder, full=full)
            if damage is not None and folder.exists():  # it may have been removed in the meantime
                yield Finding(path=folder, problem=damage, remedy="Remove it: the training continues from the previous checkpoint.")


def _check_files(dataset: Dataset, *, manifest: Manifest, full: bool) -> None:
    for name, (size, _) in manifest.files.items():
        path = dataset.folder / manifest.payload / name
        if not path.is_file():
            raise DamagedPart(f"{path} is missing.", remedy=remake_part(dataset.folder))
        if path.stat().st_size != size:
            problem = f"{path} has {path.stat().st_size} bytes, but had {size} when it was committed."
            raise DamagedPart(problem, remedy=remake_part(dataset.folder))
        if full or name.endswith("zarr.json"):
            dataset.require_file(manifest, name)


def _check_tokenizer(folder: Path, *, full: bool) -> Iterator[Finding]:
    try:
        settings = read_object(folder / "settings.json")
        with open_file(folder / "tokenizer.json") as file:
            definition = file.read().decode()
        digest = tokenizer_digest(definition, roles=settings["roles"], prepends_bos=settings["prepends_bos"])
        if digest != folder.name:
            raise DamagedPart(f"its content hashes to {digest[:12]}…, not to its name")
        if full:
            check_tokenizer_table(folder)
        elif not (folder / "token_bytes.parquet").is_file():
            raise DamagedPart("token_bytes.parquet is missing")
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield Finding(
            path=folder, problem=f"is not the tokenizer that was saved ({error})", remedy=remake(folder.parents[1]), repair="remove"
        )


def _key(dataset: Dataset) -> tuple[str, str]:
    return dataset.kind, dataset.name


def _gone(dataset: Dataset, part: int) -> Finding:
    problem = "is missing: the catalog lists this part"
    return Finding(
        path=dataset.manifest_path(part), problem=problem, remedy=remake_part(dataset.folder), part=(*_key(dataset), part), repair="remake"
    )


def _damaged(dataset: Dataset, part: int, problem: str) -> Finding:
    return Finding(
        path=dataset.manifest_path(part), problem=problem, remedy=remake_part(dataset.folder), part=(*_key(dataset), part), repair="remake"
    )


def _finding(
    path: Path, error: FuselineError, *, part: PartName | None = None, repair: Literal["remake", "remove", "by hand"] = "by hand"
) -> Finding:
    """The problem, without the path, and what to do."""
    problem = error.problem.removeprefix(f"{path} ").rstrip(".")
    is_said = repair == "by hand" or (part is not None and error.remedy)
    return Finding(path=path, problem=problem, remedy=error.remedy if is_said else remake_part(path.parent), part=part, repair=repair)
