"""Repair: damaged parts are set aside, missing and damaged parts are made again by the recipe's stages, and compared with the old ones.

Crash-safe: `repair.json` first gets the list of parts to make again, and an interrupted repair continues from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..store import catalog, durable
from ..store.dataset import Dataset
from ..store.errors import DamagedPart, FuselineError, reason_of
from ..store.fingerprint import require_seal, sealed
from ..store.inside import plain_name
from ..store.json_files import is_count, read_object
from ..store.manifest import MOST_PARTS, SCHEMA_VERSION
from ..store.remedy import remake
from ..store.shown import shown
from ..store.verify import Finding, PartName, verify
from ..store.workspace import Workspace
from .pipeline import Pipeline
from .products.corpus import Corpus

_Checksums = dict[str, tuple[int, int]]  # as in a manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """The result of a repair."""

    made: list[PartName] = field(default_factory=list)
    different: dict[PartName, list[str]] = field(default_factory=dict)  # made again with different content: files that differ
    left: list[Finding] = field(default_factory=list)  # could not be repaired


def repair(pipeline: Pipeline, *, full: bool) -> Repair:
    """Make the damaged or missing parts again. Parts that were never made are left to `run`.

    Args:
        pipeline: pipeline of the recipe that made the workspace. The caller is the coordinator, and has not folded the catalog since.
        full: also find damage that only shows if everything is read.

    Raises:
        FingerprintMismatch: the recipe does not match the workspace. Nothing was changed.
        DamagedPart: the record of an interrupted repair cannot be read. Nothing was changed.
    """
    workspace, done = pipeline.workspace, Repair()
    interrupted = _interrupted(workspace)
    found = verify(workspace, full=full)
    made = {(product.kind, product.name): product for product in pipeline.repairable()}
    for product in made.values():
        if not pipeline.graph.needs_made_model(product):
            pipeline.site.stage(product)  # the recipe must match the workspace
    _repair_what_is_no_part(pipeline, found.findings)
    lost = {part: _checksums(workspace, part) for part in found.lost_parts if part[:2] in made}
    lost |= {part: files for part, files in interrupted.items() if part[:2] in made}
    others = {part: files for part, files in interrupted.items() if part[:2] not in made}  # for the repair with another recipe
    _remember(workspace, lost | others)
    for key in sorted({part[:2] for part in lost}):
        catalog.forget(workspace, kind=key[0], name=key[1])
    for part in lost:
        _set_aside(workspace, part)
    for key, product in made.items():
        parts = sorted(part for *names, part in lost if tuple(names) == key)
        if parts:
            pipeline.make_parts(product, parts=parts)
            done.made.extend((*key, part) for part in parts)
    for part in done.made:
        before, after = lost[part], _checksums(workspace, part)
        changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
        if before and changed:
            done.different[part] = changed
    pipeline.fold()
    _remember(workspace, others)
    done.left.extend(verify(workspace, full=full).findings)
    reported = {finding.part for finding in done.left}
    done.left.extend(_set_aside_by_another(workspace, part) for part in sorted(others.keys() - reported))
    return done


def _repair_what_is_no_part(pipeline: Pipeline, findings: list[Finding]) -> None:
    """Write the catalog, the plan of a corpus, or a tokenizer again if it is missing."""
    workspace, site = pipeline.workspace, pipeline.site
    models = [model for recipe in pipeline.graph.recipes.values() for model in site.models(recipe).values()]
    tokenizers = {workspace.folder("tokenizers", model.tokenizer.digest): model.tokenizer for model in models}
    plans = {corpus.folder(workspace) / "plan.json": corpus for corpus in pipeline.graph.of_kind(Corpus)}
    for path in (finding.path for finding in findings if finding.repair == "remove"):
        if path == workspace.catalog_path:
            durable.remove(path)
        elif path in plans:
            durable.remove(path)
            site.corpus_stage(plans[path]).parts()  # writes the plan
        elif path in tokenizers:
            durable.remove(path)
            tokenizers[path].save(path)


def _checksums(workspace: Workspace, part: PartName) -> _Checksums:
    """The checksums of a part's files. Empty if the manifest cannot be read, or an earlier version encoded the files."""
    try:
        manifest = Dataset.open(workspace.folder(part[0], part[1])).manifest(part[2])
    except FuselineError:
        return {}
    return manifest.files if manifest.schema_version == SCHEMA_VERSION else {}


def _set_aside(workspace: Workspace, part: PartName) -> None:
    Dataset.open(workspace.folder(part[0], part[1])).drop(part[2])


def _remember(workspace: Workspace, lost: dict[PartName, _Checksums]) -> None:
    """Record the parts that are set aside, until they are made again. With no parts, record nothing."""
    path = _record_path(workspace)
    if lost:
        durable.write_json(path, sealed({"parts": [{"part": part, "files": files} for part, files in lost.items()]}))
    else:
        durable.discard(path)


def _interrupted(workspace: Workspace) -> dict[PartName, _Checksums]:
    """The parts that an interrupted repair set aside, or was about to set aside.

    Raises:
        DamagedPart: the record cannot be read.
    """
    path = _record_path(workspace)
    try:
        record = read_object(path)
        require_seal(record)
        return {_part_name(entry["part"]): {name: (size, crc) for name, (size, crc) in entry["files"].items()} for entry in record["parts"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedPart(
            f"{path}, the record of an interrupted repair, cannot be read ({reason_of(error)}). "
            "Remove it, and run `fuseline run RECIPE`: it makes these parts again, but does not compare them with the old ones."
        ) from error


def _part_name(entry: Sequence[Any]) -> PartName:
    """The name of a part from the record. It must name a part of a dataset in the workspace.

    Raises:
        ValueError, TypeError: it does not.
    """
    kind, name, part = entry
    if "/" in plain_name(kind) or "/" in plain_name(name) or not is_count(part, below=MOST_PARTS):
        raise ValueError(f"{shown(list(entry))} must be a kind of dataset, a name and a part")
    return kind, name, part


def _record_path(workspace: Workspace) -> Path:
    return workspace.root / "repair.json"


def _set_aside_by_another(workspace: Workspace, part: PartName) -> Finding:
    return Finding(
        path=workspace.folder(part[0], part[1]) / f"part-{part[2]:05d}.json",
        problem="belongs to another recipe, and an interrupted repair set it aside",
        remedy=f"{remake(workspace.root)}, where RECIPE is the recipe that made it",
        part=part,
    )
