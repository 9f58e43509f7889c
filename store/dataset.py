"""A dataset is all parts of one product of a stage. A part exists if and only if its manifest exists.

    <dataset>/dataset.json             what the dataset is: its identity, hashed to its fingerprint
    <dataset>/part-00042.zarr          arrays (or part-00042.parquet, a table): immutable once the manifest is there
                                       (part-00042.1.zarr if a dead worker left something under the first name)
    <dataset>/part-00042.json          the manifest: fingerprint, counts, checksums, producer; its appearance is the commit

Only parts with a manifest are read. Zarr reads a missing chunk as zeros without an error, so files that no manifest names are never read.
"""

import contextlib
import itertools
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import polars as pl
from numpy.typing import NDArray

from .. import __version__
from . import durable
from .arrays import Arrays, Encoding, write_group
from .checksums import checksums, size_and_crc
from .errors import DamagedPart, FingerprintMismatch, reason_of
from .fingerprint import Identity, differences, fingerprint, require_seal, sealed
from .inside import OutsideFolder, require_inside
from .json_files import Facts, is_count, read_object
from .machine import threads
from .manifest import Manifest, part_of, payload_named_by, read_manifest
from .part import PartArrays, Reads
from .paths import workspace_around
from .remedy import remake_part
from .shown import shown

_REMEDY_OF_RECORD = "Remove it and run the recipe again: it is written again, and the parts are kept if their inputs are the same."


@dataclass(frozen=True, slots=True, kw_only=True)
class PartContent:
    """The result of a stage for one part, before it is committed."""

    data: Arrays | pl.DataFrame
    counts: Mapping[str, int]  # documents, segments, tokens, …: summed by `status`
    attributes: Mapping[str, Any] | None = None  # small values stored beside the arrays
    encodings: Mapping[str, Encoding] | None = None  # of arrays of log-probabilities; other arrays are stored as given


@dataclass(frozen=True, slots=True)
class Dataset:
    """The parts of one product in one folder, all made from the same identity."""

    folder: Path
    identity: Identity
    description: Mapping[str, Any]  # facts that do not determine the content, such as where a model came from

    @classmethod
    def create(cls, folder: Path, *, identity: Identity, description: Mapping[str, Any] | None = None) -> Self:
        """Open the dataset with this identity; create its folder if it is missing.

        Raises:
            FingerprintMismatch: the folder holds a dataset with a different identity; the text shows both, key by key.
        """
        path = folder / "dataset.json"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            record = {"fingerprint": fingerprint(identity), "identity": identity, "description": dict(description or {})}
            with contextlib.suppress(FileExistsError):  # another process was faster
                durable.write_new_json(path, sealed(record))
        stored = cls.open(folder)
        stored.require(identity)
        return stored

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open an existing dataset with any identity.

        Raises:
            DamagedPart: there is no readable `dataset.json`.
        """
        path = folder / "dataset.json"
        try:
            record = read_object(path)
            require_seal(record)
            stored, is_sound = record["fingerprint"], fingerprint(record["identity"]) == record["fingerprint"]
            facts = [Facts(record[name], path=path, what=name, remedy=_REMEDY_OF_RECORD) for name in ("identity", "description")]
            _check_facts(*facts)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedPart(f"{path} cannot be read ({reason_of(error)}).", remedy=_REMEDY_OF_RECORD) from error
        if not is_sound:
            raise DamagedPart(
                f"{path} was changed by hand: its identity does not hash to its fingerprint ({shown(stored)}).", remedy=_REMEDY_OF_RECORD
            )
        return cls(folder, *facts)

    @property
    def fingerprint(self) -> str:
        """The hash of the identity (`fingerprint.fingerprint`)."""
        return fingerprint(self.identity)

    @property
    def name(self) -> str:
        """Its name, unique within its kind: `gemma-3-270m`, `gemma-3-270m--smollm2`."""
        return self.folder.name

    @property
    def kind(self) -> str:
        """`corpus`, `distributions`, `token_matches`, `vocab_maps`, `alignments`, `targets` or `evaluations`."""
        return self.folder.parent.name

    def require(self, identity: Identity) -> None:
        """Raise FingerprintMismatch, with each key that differs, unless the dataset has this identity."""
        if fingerprint(identity) == self.fingerprint:
            return
        lines = "\n  ".join(differences(self.identity, identity))
        if self.kind in ("vocab_maps", "token_matches", "alignments"):  # recipes do not name these
            remedy = f"Remove {self.folder} and run again (it is made from stored data in minutes), or use another --workspace."
        else:
            remedy = f"Rename the dataset in the recipe, use another --workspace, or remove {self.folder} to make it again."
        raise FingerprintMismatch(f"{self.kind}/{self.name} was made from different inputs than the recipe asks for:\n  {lines}\n{remedy}")

    def parts(self) -> list[int]:
        """Indices of the committed parts, ascending."""
        found = (part_of(path.name) for path in self.folder.glob("part-*.json"))
        return sorted(part for part in found if part is not None)

    def missing(self, parts: Iterable[int]) -> list[int]:
        """The parts of these that are not committed, ascending."""
        return sorted(set(parts) - set(self.parts()))

    def manifest(self, part: int) -> Manifest:
        """The manifest of a committed part.

        Raises:
            DamagedPart: it is missing or cannot be read.
            FingerprintMismatch: it belongs to a dataset with a different identity.
        """
        path = self._path(part, ".json")
        manifest = read_manifest(path, part=part)
        if manifest.fingerprint != self.fingerprint:
            problem = f"{path} belongs to another dataset (fingerprint {manifest.fingerprint[:12]}…)."
            raise FingerprintMismatch(problem, remedy="Remove it.")
        return manifest

    def commit(self, part: int, *, content: PartContent, seconds: float) -> Manifest:
        """Write a part durably: write the payload to a temporary sibling, fsync, rename, then write the manifest in the same way.

        A part that is already committed is kept: parts are functions of their inputs, so both are the same. Two workers may commit the same
        part at the same time: neither replaces or removes files that the other has published, and the first manifest counts.
        """
        path, is_table = self._path(part, ".json"), isinstance(content.data, pl.DataFrame)
        if path.exists():
            return self.manifest(part)
        suffix = ".parquet" if is_table else ".zarr"
        with durable.temporary(self._path(part, suffix)) as temporary:
            if isinstance(content.data, pl.DataFrame):
                temporary.write_bytes(durable.parquet_bytes(content.data))
            else:
                write_group(temporary, arrays=content.data, attributes=content.attributes or {}, encodings=content.encodings)
            files = checksums(temporary)
            if path.exists():
                return self.manifest(part)
            payload = self._publish(temporary, part=part, suffix=suffix, files=files)
        manifest = Manifest(
            fingerprint=self.fingerprint,
            part=part,
            payload=payload.name,
            counts=dict(content.counts),
            files=files,
            producer={
                "fuseline": __version__,
                "host": platform.node(),
                "threads": threads(),
                "committed_at": time.time(),
                "seconds": round(seconds, 3),
            },
        )
        try:
            durable.write_new_json(path, sealed({name: getattr(manifest, name) for name in Manifest.__slots__}))
        except FileExistsError:
            return self.manifest(part)
        return manifest

    def _publish(self, temporary: Path, *, part: int, suffix: str, files: dict[str, tuple[int, int]]) -> Path:
        """Publish a payload under the first free name, or use an existing one with the same content.

        An existing one is usual after a crash between payload and manifest. One with different content may belong to another worker that is
        about to write its manifest.
        """
        for attempt in itertools.count():
            payload = self._path(part, f".{attempt}{suffix}" if attempt else suffix)
            try:
                durable.publish_new(temporary, to=payload)
                break
            except FileExistsError:
                if _adopt(payload, files=files):
                    break
        return payload

    def drop(self, part: int) -> None:
        """Undo the commit of a part: remove its manifest first, then the payload that it names, if the manifest can be read.

        Raises:
            DamagedPart: the folder is a link into another workspace.
        """
        if workspace_around(self.folder) not in (None, self.folder.parents[1].resolve()):
            remedy = "Replace the link with the folder itself, or remove the link."
            raise DamagedPart(f"{self.folder} is a link into another workspace. fuseline removes nothing there.", remedy=remedy)
        path, payload = self.manifest_path(part), None
        with contextlib.suppress(OSError):
            payload = payload_named_by(path, part=part)
        durable.remove(path)
        if payload is not None:
            durable.remove(self.folder / payload)

    def arrays(self, part: int, *, reads: Reads | None = None) -> PartArrays:
        """The arrays of a committed part, to be read whole or by rows; `reads` counts what is read.

        Raises:
            DamagedPart: the manifest or its folder is missing, or the metadata in it has changed since the commit.
        """
        manifest = self.manifest(part)
        payload = self.folder / manifest.payload
        self._require_inside(payload, part=part)
        return PartArrays(payload, manifest=manifest, remedy=self._remedy(), reads=reads)

    def read(self, part: int, *names: str) -> tuple[NDArray[Any], ...]:
        """Whole arrays of a committed part, decoded and checked against their checksums.

        Raises:
            DamagedPart: an array is missing or does not match its checksum.
        """
        arrays = self.arrays(part)
        return tuple(arrays.read(name) for name in names)

    def table(self, part: int) -> pl.DataFrame:
        """The table of a committed Parquet part.

        Raises:
            DamagedPart: it is missing, unreadable, or has changed since the commit.
        """
        path = self.table_path(part)
        try:
            return durable.read_parquet(path)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise DamagedPart(f"{path} cannot be read ({reason_of(error)}).", remedy=self._remedy()) from error

    def table_path(self, part: int) -> Path:
        """The file of a committed Parquet part, verified.

        Raises:
            DamagedPart: it is missing, or has changed since the commit.
        """
        manifest = self.manifest(part)
        self.require_file(manifest, "")  # of 300 flipped bits in a Parquet file without checksums, 174 changed its text silently
        return self.folder / manifest.payload

    def require_payload(self, part: int) -> None:
        """Raise DamagedPart if the payload of a committed part is missing. `verify` checks whether it is complete."""
        payload = self.folder / self.manifest(part).payload
        if not payload.exists():
            raise DamagedPart(f"{payload} is missing, but its manifest names it.", remedy=self._remedy())
        self._require_inside(payload, part=part)

    def manifest_path(self, part: int) -> Path:
        """The path of a part's manifest, which may not exist."""
        return self._path(part, ".json")

    def _path(self, part: int, suffix: str) -> Path:
        return self.folder / f"part-{part:05d}{suffix}"

    def require_file(self, manifest: Manifest, name: str) -> None:
        """Raise DamagedPart unless a file of a part's payload (by its path in it) has the size and checksum of the manifest."""
        part, path = manifest.part, self.folder / manifest.payload / name
        self._require_inside(path, part=part)
        try:
            is_same = size_and_crc(path) == manifest.files[name]
        except (OSError, KeyError) as error:
            raise DamagedPart(f"{path} cannot be read ({reason_of(error)}).", remedy=self._remedy()) from error
        if not is_same:
            raise DamagedPart(f"{path} has changed since the commit: its checksum differs from the manifest's.", remedy=self._remedy())

    def _require_inside(self, path: Path, *, part: int) -> None:
        """Raise DamagedPart if a file of a part is a link out of the dataset. The dataset's folder itself may be a link."""
        try:
            require_inside(path, folder=self.folder)
        except OutsideFolder as error:
            raise DamagedPart(error.problem, remedy=self._remedy()) from error

    def _remedy(self) -> str:
        return remake_part(self.folder, full=True)


def as_ranges(parts: Iterable[int]) -> str:
    """Part numbers in short form: `3-7, 12`."""
    found: list[list[int]] = []
    for part in sorted(parts):
        if found and part == found[-1][-1] + 1:
            found[-1][1:] = [part]
        else:
            found.append([part])
    return ", ".join("-".join(map(str, ends)) for ends in found)


def _check_facts(identity: Facts, description: Facts) -> None:
    """Raise ValueError if a fact that any kind of dataset can have does not have the type that its readers expect."""
    for facts in (identity, description):
        for name, value in facts.items():
            is_right = _KINDS_OF_FACTS.get(name)
            if is_right is not None and not is_right(value):
                raise ValueError(f"{name} ({shown(value)}) has the wrong type")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_text_or_none(value: object) -> bool:
    return value is None or isinstance(value, str)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_lists_of_texts(value: object) -> bool:
    return isinstance(value, list) and all(value) and all(map(_are_texts, value))


# Types of facts, for all kinds of datasets. Other facts are only shown or compared, and may have any type.
_KINDS_OF_FACTS: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("corpus", "tokenizer", "target", "source", "matches", "model", "split", "positions"), _is_text),
    **dict.fromkeys(("arithmetic", "dtype"), _is_text_or_none),
    "chat": lambda value: isinstance(value, dict),
    "segmented_for": _are_texts,
    "sources": _are_lists_of_texts,
    "top_k": is_count,
    "vocab_size": is_count,
}


def _adopt(payload: Path, *, files: dict[str, tuple[int, int]]) -> bool:
    """Whether a payload without a manifest holds exactly these files; if so, `store gc` keeps it for another hour."""
    try:
        os.utime(payload)
        return checksums(payload) == files
    except OSError:  # part of it is missing
        return False
