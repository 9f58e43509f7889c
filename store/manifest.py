"""The manifest of a part: the small file that commits the part. Every field is checked when it is read."""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DamagedPart, NewerPart, reason_of
from .fingerprint import require_seal
from .inside import plain_name
from .json_files import END_OF_TIME, is_count, is_number, read_object
from .remedy import remake_part
from .shown import shown

# Versions of manifests. 2 has a checksum, and an array may be encoded in q8, which a reader of version 1 would read as plain numbers.
SCHEMA_VERSION = 2
MOST_PARTS = 1 << 31  # of a dataset: the catalog's integers end there
_NAME = re.compile(r"part-(?P<part>\d{5,10})\.json")
_PAYLOAD = re.compile(r"part-(?P<part>\d{5,10})(\.[1-9]\d{0,5})?\.(zarr|parquet)")
_PLAIN_FILE = re.compile(r"[A-Za-z0-9_]+(\.json)?(/[A-Za-z0-9_]+(\.json)?)*")  # names that fuseline writes; others are checked in full
_MOST_BYTES = 1 << 53  # of a file


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The small file that commits a part."""

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


def part_of(name: str) -> int | None:
    """The part whose manifest has this file name; None if it is not a manifest's name."""
    return _part_in(_NAME.fullmatch(name))


def part_of_payload(name: object) -> int | None:
    """The part whose payload has this name; None if it is not a payload's name."""
    return _part_in(_PAYLOAD.fullmatch(name)) if isinstance(name, str) else None


def read_manifest(path: Path, *, part: int) -> Manifest:
    """Read the manifest of a part.

    Raises:
        DamagedPart: it is missing, cannot be read, or is not a valid manifest of this part.
        NewerPart: a newer fuseline wrote it.
    """
    try:
        record = read_object(path)
        require_seal(record)
        version = record["schema_version"]
        if is_count(version) and version > SCHEMA_VERSION:
            written_by = shown(record["producer"]["fuseline"])
            raise NewerPart(f"{path} was written by a newer fuseline ({written_by}).", remedy="Use that version.")
        _check(record, part=part)
        return Manifest(**record | {"files": {name: (size, crc) for name, (size, crc) in record["files"].items()}})
    except NewerPart:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedPart(f"{path} cannot be read ({reason_of(error)}).", remedy=remake_part(path.parent)) from error


def payload_named_by(path: Path, *, part: int) -> str | None:
    """The payload that a manifest names, even if the rest of the manifest is damaged; None if it names no payload of this part.

    Raises:
        FileNotFoundError: there is no manifest.
    """
    with contextlib.suppress(ValueError, PermissionError, IsADirectoryError):
        name = read_object(path).get("payload")
        if part_of_payload(name) == part:
            return str(name)
    return None


def _part_in(found: "re.Match[str] | None") -> int | None:
    if found is None:
        return None
    part = int(found["part"])
    return part if f"{part:05d}" == found["part"] and part < MOST_PARTS else None


def _check(record: dict[str, Any], *, part: int) -> None:
    """Raise ValueError, KeyError or TypeError unless a record has the form of a manifest of this part."""
    if record["part"] != part or type(record["part"]) is not int:
        raise ValueError(f"it is the manifest of part {shown(record['part'])}")
    if part_of_payload(record["payload"]) != part:
        raise ValueError(f"payload ({shown(record['payload'])}) must be the name of a payload of part {part}")
    if not isinstance(record["fingerprint"], str) or not is_count(record["schema_version"]):
        raise ValueError("fingerprint must be a string and schema_version a number")
    for name in ("counts", "files", "producer"):
        if not isinstance(record[name], dict):
            raise ValueError(f"{name} ({shown(record[name])}) must be an object")
    for name, count in record["counts"].items():
        if not is_count(count):
            raise ValueError(f"counts.{shown(name)} ({shown(count)}) must be a whole number from 0")
    is_table = record["payload"].endswith(".parquet")
    for name, entry in record["files"].items():
        size, crc = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if type(size) is not int or type(crc) is not int or not 0 <= size <= _MOST_BYTES or not 0 <= crc < 1 << 32:
            raise ValueError(f"files: size and CRC-32 of {shown(name)} must be whole numbers from 0")
        if is_table and name:
            raise ValueError(f"files ({shown(name)}) must have one entry, the table, with an empty name")
        if not is_table and not _PLAIN_FILE.fullmatch(name):
            plain_name(name, what="A name in files")
    producer = record["producer"]
    for name in ("fuseline", "host"):
        if not isinstance(producer[name], str):
            raise ValueError(f"producer.{name} must be a string")
    for name in ("committed_at", "seconds"):
        if not is_number(producer[name], below=END_OF_TIME):
            raise ValueError(f"producer.{name} ({shown(producer[name])}) must be a number of seconds, at least 0")
    if not is_count(producer.get("threads") or 0):
        raise ValueError(f"producer.threads ({shown(producer['threads'])}) must be a whole number from 0")
