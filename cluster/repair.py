"""Repair: what is damaged or gone is set aside and made again by the stages of the recipe, and compared with what it was.

Crash-safe: what is to be made again is written to `repair.json` first, and a repair that was interrupted goes on from there.
"""

import json
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from ..store import catalog, durable
from ..store.dataset import SCHEMA_VERSION, Dataset
from ..store.errors import FuselineError
from ..store.verify import Finding, PartName, verify
from ..store.workspace import Workspace
from .pipeline import Pipeline

_Checksums = dict[str, tuple[int, int]]  # as in a manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """What a repair did."""

    made: list[PartName] = field(default_factory=list)
    different: dict[PartName, list[str]] = field(default_factory=dict)  # made again, but not as they were: files that differ
    left: list[Finding] = field(default_factory=list)  # what it could not mend


def repair(pipeline: Pipeline, *, full: bool) -> Repair:
    """Find what is damaged or gone, and make exactly that again. Parts that never were are left to `run`.

    Args:
        pipeline: of the recipe that made the workspace; the caller is the coordinator, and has not folded the catalog since the damage.
        full: find also what only reading everything can find.

    Raises:
        FingerprintMismatch: the recipe asks for something else than the workspace holds. Nothing was changed.
    """
    workspace, done = pipeline.workspace, Repair()
    found = verify(workspace, full=full)
    stages = list(pipeline.stages())
    _mend_what_is_no_part(pipeline, found.findings)
    mine = {(stage.dataset.kind, stage.dataset.name) for _, stage in stages} | pipeline.trained_evaluations
    lost = {part: _checksums(workspace, part) for part in found.lost_parts if part[:2] in mine} | _interrupted(workspace)
    _remember(workspace, lost)
    for key in sorted({part[:2] for part in lost}):
        catalog.forget(workspace, kind=key[0], name=key[1])
    for part in lost:
        _set_aside(workspace, part)
    for title, stage in chain(stages, pipeline.trained_stages()):
        key = (stage.dataset.kind, stage.dataset.name)
        parts = sorted(part for *names, part in lost if tuple(names) == key)
        if parts:
            pipeline.make(title, stage, parts=parts)
            done.made.extend((*key, part) for part in parts)
    for part in done.made:
        before, after = lost[part], _checksums(workspace, part)
        changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
        if before and changed:
            done.different[part] = changed
    pipeline.fold()
    (workspace.root / "repair.json").unlink(missing_ok=True)
    done.left.extend(verify(workspace, full=full).findings)
    return done


def _mend_what_is_no_part(pipeline: Pipeline, findings: list[Finding]) -> None:
    """The catalog, the corpus's plan, a tokenizer: each is written again where it is missing."""
    workspace, corpus = pipeline.workspace, pipeline.corpus
    tokenizers = {workspace.folder("tokenizers", model.tokenizer.digest): model.tokenizer for model in pipeline.models.values()}
    for path in (finding.path for finding in findings if finding.mend == "remove"):
        if path == workspace.catalog_path:
            durable.remove(path)
        elif path == corpus.dataset.folder / "plan.json":
            durable.remove(path)
            corpus.parts()  # plans it
        elif path in tokenizers:
            durable.remove(path)
            tokenizers[path].save(path)


def _checksums(workspace: Workspace, part: PartName) -> _Checksums:
    """What a part's manifest says of its files; nothing to compare with where it cannot be read, or an earlier version encoded them."""
    try:
        manifest = Dataset.open(workspace.folder(part[0], part[1])).manifest(part[2])
    except FuselineError:
        return {}
    return manifest.files if manifest.schema_version == SCHEMA_VERSION else {}


def _set_aside(workspace: Workspace, part: PartName) -> None:
    Dataset.open(workspace.folder(part[0], part[1])).drop(part[2])


def _remember(workspace: Workspace, lost: dict[PartName, _Checksums]) -> None:
    if lost:
        record: list[dict[str, Any]] = [{"part": part, "files": files} for part, files in lost.items()]
        durable.write_json(workspace.root / "repair.json", record)


def _interrupted(workspace: Workspace) -> dict[PartName, _Checksums]:
    """What an interrupted repair had set aside, or was about to."""
    path = workspace.root / "repair.json"
    if not path.exists():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    return {tuple(entry["part"]): {name: (size, crc) for name, (size, crc) in entry["files"].items()} for entry in record}
