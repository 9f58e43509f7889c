"""Sizes and CRC-32 of files, as stored in manifests."""

import os
import zlib
from pathlib import Path

from .json_files import open_file


def checksums(payload: Path) -> dict[str, tuple[int, int]]:
    """Bytes and CRC-32 of each file of a folder by its relative path, sorted; for a single file, under the path `""`."""
    if payload.is_file():
        return {"": size_and_crc(payload)}
    found = {}
    for folder, _, names in os.walk(payload):
        for name in names:
            path = Path(folder, name)
            found[path.relative_to(payload).as_posix()] = size_and_crc(path)
    return dict(sorted(found.items()))


def size_and_crc(path: Path) -> tuple[int, int]:
    """Bytes and CRC-32 of one file."""
    crc = size = 0
    with open_file(path) as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
            size += len(block)
    return size, crc
