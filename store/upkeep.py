"""The disk space of a workspace's parts, and its leftover files that nothing needs."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import durable
from .dataset import Dataset
from .errors import FuselineError
from .json_files import read_object
from .lineage import tokenizer_digests
from .manifest import part_of_payload
from .workspace import Workspace

_YOUNG_SECONDS = 3600.0  # a worker may be about to write its manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """The disk space of one dataset."""

    kind: str
    name: str
    parts: int
    tokens: int
    n_bytes: int
    arrays: dict[str, int]  # bytes of each array over all parts; `metadata` and `table` are everything else


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """A file or folder that nothing refers to."""

    path: Path
    n_bytes: int
    why: str
    is_payload: bool = False  # a worker may commit it at any time, with a manifest that names it


def usage(workspace: Workspace) -> list[Usage]:
    """The disk space of each dataset, from the manifests alone.

    Raises:
        DamagedPart: a manifest cannot be read.
    """
    found = []
    for dataset in workspace.datasets():
        manifests = [dataset.manifest(part) for part in dataset.parts()]
        arrays: dict[str, int] = {}
        for manifest in manifests:
            for path, (size, _) in manifest.files.items():
                name = "metadata" if path.endswith("zarr.json") else path.split("/")[0] or "table"
                arrays[name] = arrays.get(name, 0) + size
        found.append(
            Usage(
                kind=dataset.kind,
                name=dataset.name,
                parts=len(manifests),
                tokens=sum(manifest.counts.get("tokens", 0) for manifest in manifests),
                n_bytes=sum(arrays.values()),
                arrays=arrays,
            )
        )
    return found


def leftovers(workspace: Workspace) -> list[Leftover]:
    """Leftovers: files of dead writers, payloads without a manifest, files that no manifest lists, tokenizers without a dataset.

    Files touched within the last hour are left out: a worker may be between a payload and its manifest. A link can be a leftover, but never
    its target, nor anything in a dataset or a set of tokenizers that is reached through a link: others may need it.
    """
    found = list(_temporaries(workspace))
    datasets = list(workspace.datasets())
    for dataset in datasets:
        if not dataset.folder.is_symlink():
            found += _unnamed(dataset)
    needed = {digest for dataset in datasets for digest in tokenizer_digests(dataset)}
    for folder in workspace.tokenizer_folders() if not workspace.folder("tokenizers", ".").is_symlink() else ():
        if folder.name not in needed and _is_old(folder) and _is_tokenizer(folder):
            found.append(_leftover(folder, "no dataset was made with this tokenizer"))
    return found


def delete(workspace: Workspace, found: list[Leftover]) -> list[Leftover]:
    """Remove leftovers that are still unused, and return them. Only the coordinator may call it; workers may run at the same time."""
    still = {leftover.path for leftover in leftovers(workspace)}
    removed = []
    for leftover in found:
        if leftover.path not in still:
            continue
        if leftover.is_payload:
            if not _remove_payload(leftover.path):
                continue
        else:
            durable.remove(leftover.path)
        removed.append(leftover)
    return removed


def _remove_payload(payload: Path) -> bool:
    """Remove a payload unless a worker commits it: `dataset._adopt` touches it first, and does not find it after the rename."""
    if _is_wanted(payload, name=payload.name):
        return False
    with durable.temporary(payload) as doomed:
        payload.rename(doomed)
        if not _is_wanted(doomed, name=payload.name):
            return True
        with contextlib.suppress(FileExistsError):  # another worker has published the same part with this name
            durable.publish_new(doomed, to=payload)
        return False


def _is_wanted(path: Path, *, name: str) -> bool:
    """Whether the payload `name` was touched recently, or a manifest names it."""
    return not _is_old(path) or _is_named(path.with_name(name))


def _temporaries(workspace: Workspace) -> Iterator[Leftover]:
    for folder in workspace.swept_folders():
        for path in durable.abandoned(folder):
            with contextlib.suppress(FileNotFoundError):  # another process has just removed it
                yield _leftover(path, "its writer is dead")


def _unnamed(dataset: Dataset) -> Iterator[Leftover]:
    """Payloads of a dataset that no manifest names, and files in payloads that no manifest lists."""
    listed: dict[str, set[str]] = {}
    unknown = set()  # parts whose manifest cannot be read: it may name any of the part's payloads
    for part in dataset.parts():
        try:
            manifest = dataset.manifest(part)
            listed[manifest.payload] = set(manifest.files)
        except FuselineError:
            unknown.add(dataset.manifest_path(part).stem)
    for payload in sorted(path for path in dataset.folder.glob("part-*") if part_of_payload(path.name) is not None):
        if payload.name.split(".")[0] in unknown or not _is_old(payload):
            continue
        if payload.name not in listed:
            if not _is_named(payload):
                yield _leftover(payload, "no manifest names it", is_payload=True)
        elif durable.is_real_folder(payload):
            for path in sorted(path for path in payload.rglob("*") if not durable.is_real_folder(path)):
                if path.relative_to(payload).as_posix() not in listed[payload.name] and _is_old(path):
                    yield _leftover(path, "the part's manifest does not list it")


def _is_named(payload: Path) -> bool:
    """Whether a manifest written since the last read names it."""
    path = payload.with_name(f"{payload.name.split('.')[0]}.json")
    try:
        return bool(read_object(path)["payload"] == payload.name)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError):
        return True


def _is_old(path: Path) -> bool:
    try:
        return time.time() - durable.last_touched(path) > _YOUNG_SECONDS
    except FileNotFoundError:
        return False


def _leftover(path: Path, why: str, *, is_payload: bool = False) -> Leftover:
    files = [file for file in path.rglob("*") if not durable.is_real_folder(file)] if durable.is_real_folder(path) else [path]
    return Leftover(path=path, n_bytes=sum(file.lstat().st_size for file in files), why=why, is_payload=is_payload)


def _is_tokenizer(folder: Path) -> bool:
    """Whether a folder was made by `Tokenizer.save`, or is a link."""
    return folder.is_symlink() or (folder / "settings.json").is_file()
