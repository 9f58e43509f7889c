"""A dataset is all parts of one product of a stage; a part exists when, and only when, its manifest does.

    <dataset>/dataset.json             what the dataset is: its identity, hashed to its fingerprint
    <dataset>/part-00042.zarr          arrays (or part-00042.parquet, a table): immutable once the manifest is there
                                       (part-00042.1.zarr where the first name was taken by what a dead worker left)
    <dataset>/part-00042.json          the manifest: fingerprint, counts, checksums, producer; its appearance is the commit

Readers look only at parts with a manifest. A Zarr chunk that is missing reads back as zeros without an error, so nothing that no manifest
names is ever read.
"""

import contextlib
import itertools
import json
import os
import platform
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import polars as pl
from numpy.typing import NDArray

from .. import __version__
from . import durable
from .arrays import Arrays, Encoding, write_group
from .checksums import checksums, size_and_crc
from .errors import DamagedPart, FingerprintMismatch, NewerPart
from .fingerprint import Identity, differences, fingerprint, require_seal, sealed
from .machine import threads
from .part import PartArrays, Reads

# Versions of manifests. 2: it has a checksum; and an array may be encoded in q8, which a reader of version 1 would take for numbers.
SCHEMA_VERSION = 2
_MANIFEST = re.compile(r"part-(?P<part>\d{5,})\.json")
_REMEDY_OF_RECORD = "Remove it and run the recipe again: it is written anew, and the parts stay if they are of the same inputs."


@dataclass(frozen=True, slots=True, kw_only=True)
class PartContent:
    """What a stage computed for one part, before it is committed."""

    data: Arrays | pl.DataFrame
    counts: Mapping[str, int]  # documents, segments, tokens, …: summed by `status`
    attributes: Mapping[str, Any] | None = None  # small facts stored beside the arrays
    encodings: Mapping[str, Encoding] | None = None  # of arrays of log-probabilities; of others what is given is stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The small file that makes a part exist."""

    fingerprint: str
    part: int
    payload: str  # name of the folder or file beside the manifest
    counts: dict[str, int]
    files: dict[str, tuple[int, int]]  # path inside the payload ("" for a file) -> bytes, CRC-32
    producer: dict[str, Any]  # version, host, threads of a process, time of commit, seconds of computing
    schema_version: int = SCHEMA_VERSION

    @property
    def n_bytes(self) -> int:
        """Bytes on disk of the part's payload."""
        return sum(size for size, _ in self.files.values())


@dataclass(frozen=True, slots=True)
class Dataset:
    """The parts of one product under one folder; all of them were made from the same identity."""

    folder: Path
    identity: Identity
    description: Mapping[str, Any]  # facts that do not determine the content: where a model came from, its domains' names

    @classmethod
    def create(cls, folder: Path, *, identity: Identity, description: Mapping[str, Any] | None = None) -> Self:
        """Open the dataset of this identity, making its folder if need be.

        Raises:
            FingerprintMismatch: the folder holds a dataset of another identity; the text shows both, key by key.
        """
        path = folder / "dataset.json"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            record = {"fingerprint": fingerprint(identity), "identity": identity, "description": dict(description or {})}
            with contextlib.suppress(FileExistsError):  # another process was quicker
                durable.write_new_json(path, sealed(record))
        stored = cls.open(folder)
        stored.require(identity)
        return stored

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open a dataset that exists, whatever its identity.

        Raises:
            DamagedPart: there is no readable `dataset.json`.
        """
        try:
            record = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
            require_seal(record)
            dataset, stored = cls(folder, record["identity"], record["description"]), record["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedPart(f"{folder / 'dataset.json'} cannot be read ({_reason(error)}).", remedy=_REMEDY_OF_RECORD) from error
        if dataset.fingerprint != stored:
            problem = f"{folder / 'dataset.json'} was changed by hand: its identity does not hash to its fingerprint."
            raise DamagedPart(problem, remedy=_REMEDY_OF_RECORD)
        return dataset

    @property
    def fingerprint(self) -> str:
        """Hash of the identity (`fingerprint.fingerprint`)."""
        return fingerprint(self.identity)

    @property
    def name(self) -> str:
        """Name inside its kind: `gemma-3-270m`, `gemma-3-270m--smollm2`."""
        return self.folder.name

    @property
    def kind(self) -> str:
        """`corpus`, `distributions`, `token_matches`, `vocab_maps`, `alignments`, `targets` or `evaluations`."""
        return self.folder.parent.name

    def require(self, identity: Identity) -> None:
        """Raise FingerprintMismatch, naming each key that differs, unless this is the dataset of the given identity."""
        if fingerprint(identity) == self.fingerprint:
            return
        lines = "\n  ".join(differences(self.identity, identity))
        if self.kind in ("vocab_maps", "token_matches", "alignments"):  # which have no names in recipes
            remedy = f"It is made of what is stored, in minutes: remove {self.folder} and run again, or use another --workspace."
        else:
            remedy = f"Give the dataset another name in the recipe, use another --workspace, or remove {self.folder} to make it again."
        raise FingerprintMismatch(f"{self.kind}/{self.name} was made from different inputs than the recipe asks for:\n  {lines}\n{remedy}")

    def parts(self) -> list[int]:
        """Indices of the committed parts, ascending."""
        names = (_MANIFEST.fullmatch(path.name) for path in self.folder.glob("part-*.json"))
        return sorted(int(name["part"]) for name in names if name)

    def missing(self, parts: Iterable[int]) -> list[int]:
        """Which of these parts are not committed, ascending."""
        return sorted(set(parts) - set(self.parts()))

    def manifest(self, part: int) -> Manifest:
        """The manifest of a committed part.

        Raises:
            DamagedPart: it is missing or cannot be read.
            FingerprintMismatch: it belongs to a dataset of another identity.
        """
        path = self._path(part, ".json")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            require_seal(record)
            files = {name: (size, crc) for name, (size, crc) in record.pop("files").items()}
            if record["schema_version"] > SCHEMA_VERSION:
                raise NewerPart(f"{path} was written by a newer fuseline ({record['producer']['fuseline']}).", remedy="Use that one.")
            manifest = Manifest(**record, files=files)
        except NewerPart:
            raise
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedPart(f"{path} cannot be read ({_reason(error)}).", remedy="Remove it: the part is then made again.") from error
        if manifest.fingerprint != self.fingerprint:
            problem = f"{path} belongs to another dataset (fingerprint {manifest.fingerprint[:12]}…)."
            raise FingerprintMismatch(problem, remedy="Remove it.")
        return manifest

    def commit(self, part: int, *, content: PartContent, seconds: float) -> Manifest:
        """Write a part durably: payload to a temporary sibling, fsync, rename, then the manifest in the same way.

        A part that is already committed stays as it is: parts are functions of their inputs, so both are the same. Workers may commit the
        same part at the same time: neither ever replaces or removes what the other has published, and the first manifest counts.
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
        """Give a payload the first free name, or take one of the same content that is there already.

        That is the rule after a crash between payload and manifest. Another one may be what another worker's manifest is about to name.
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
        """Undo the commit of a part: its manifest goes first, then the payload that it names, if it can still be read."""
        path = self.manifest_path(part)
        try:
            payload = json.loads(path.read_text(encoding="utf-8"))["payload"]
        except (OSError, ValueError, KeyError, TypeError):
            payload = None
        durable.remove(path)
        if isinstance(payload, str) and payload.startswith(path.stem) and (self.folder / payload).exists():
            durable.remove(self.folder / payload)

    def arrays(self, part: int, *, reads: Reads | None = None) -> PartArrays:
        """The arrays of a committed part, to be read as a whole or by rows; `reads` counts what is read.

        Raises:
            DamagedPart: the manifest or the folder it names is missing, or the metadata in it are not what was committed.
        """
        manifest = self.manifest(part)
        self.require_file(part, "zarr.json")  # the metadata of all its arrays, which Zarr has no checksum for
        sizes = {path: size for path, (size, _) in manifest.files.items()}
        return PartArrays(self.folder / manifest.payload, sizes=sizes, remedy=self._remedy(part), reads=reads)

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
            DamagedPart: it is missing, unreadable, or not what was committed.
        """
        path = self.table_path(part)
        try:
            return durable.read_parquet(path)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise DamagedPart(
                f"{path} is named by its manifest but cannot be read ({_reason(error)}).", remedy=self._remedy(part)
            ) from error

    def table_path(self, part: int) -> Path:
        """The file of a committed Parquet part, verified.

        Raises:
            DamagedPart: it is missing, or not what was committed.
        """
        self.require_file(part, "")  # of 300 flipped bits in a Parquet file without checksums, 174 changed its text silently
        return self.folder / self.manifest(part).payload

    def require_payload(self, part: int) -> None:
        """Raise DamagedPart unless what the manifest of a committed part names is there; whether it is whole, `verify` says."""
        payload = self.folder / self.manifest(part).payload
        if not payload.exists():
            raise DamagedPart(f"{payload} is named by its manifest and is gone.", remedy=self._remedy(part))

    def manifest_path(self, part: int) -> Path:
        """Where the manifest of a part is, or would be."""
        return self._path(part, ".json")

    def _path(self, part: int, suffix: str) -> Path:
        return self.folder / f"part-{part:05d}{suffix}"

    def require_file(self, part: int, name: str) -> None:
        """Raise DamagedPart unless a file of the payload (by its path in it) has the size and checksum that the manifest says."""
        manifest = self.manifest(part)
        path = self.folder / manifest.payload / name
        try:
            is_same = size_and_crc(path) == manifest.files[name]
        except (OSError, KeyError) as error:
            raise DamagedPart(
                f"{path} is named by its manifest but cannot be read ({_reason(error)}).", remedy=self._remedy(part)
            ) from error
        if not is_same:
            raise DamagedPart(f"{path} is not what was committed: its checksum differs from the manifest's.", remedy=self._remedy(part))

    def _remedy(self, part: int) -> str:
        manifest = self._path(part, ".json")
        return f"Remove {manifest} and run the stage again, or run `fuseline store repair RECIPE --full`: only this part is made anew."


def as_ranges(parts: Iterable[int]) -> str:
    """Numbers of parts as people write them: `3-7, 12`."""
    found: list[list[int]] = []
    for part in sorted(parts):
        if found and part == found[-1][-1] + 1:
            found[-1][1:] = [part]
        else:
            found.append([part])
    return ", ".join("-".join(map(str, ends)) for ends in found)


def _reason(error: Exception) -> str:
    """What an error says; of one of the system without the path, which stands beside it."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _adopt(payload: Path, *, files: dict[str, tuple[int, int]]) -> bool:
    """Whether a payload that no manifest names yet holds exactly these files; it then stays safe from `store gc` for another hour."""
    try:
        os.utime(payload)
        return checksums(payload) == files
    except OSError:  # half of it is gone
        return False
