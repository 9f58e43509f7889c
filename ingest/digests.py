"""SHA-256 of input files: corpora and model weights are identified by their content, not by their path."""

import hashlib
import re
from pathlib import Path

_CACHED_REPOSITORY = re.compile(r"(models|datasets|spaces)--.+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's content; about 1.5 GB/s.

    In the Hugging Face cache the names of large files are their SHA-256, so it need not be computed again.
    """
    blob = path.resolve()
    if _SHA256.fullmatch(blob.name) and blob.parent.name == "blobs" and _CACHED_REPOSITORY.fullmatch(blob.parent.parent.name):
        return blob.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def snapshot_commit(folder: Path) -> str | None:
    """The commit of a snapshot in the Hugging Face cache (`models--owner--name/snapshots/<commit>`); None for other folders."""
    repository = folder.absolute().parent.parent
    is_snapshot = folder.absolute().parent.name == "snapshots" and _CACHED_REPOSITORY.fullmatch(repository.name)
    return folder.name if is_snapshot and _COMMIT.fullmatch(folder.name) and (repository / "blobs").is_dir() else None
