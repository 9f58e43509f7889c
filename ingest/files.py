"""The files of a local corpus: one explicit list, which is read, fingerprinted and shown in messages.

A path may have any characters and is never a pattern. The list has every data file under the corpus's folder, with any name. Hidden files
and folders, and files of other kinds, are left out and reported.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..store.errors import DataError
from ..store.inside import require_inside
from ..store.paths import as_text
from ..store.shown import listed
from .digests import file_digest

Kind = Literal["parquet", "json", "csv", "txt"]
KINDS: dict[str, Kind] = {".parquet": "parquet", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".txt": "txt"}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
_READ = f"{', '.join(KINDS)} are read; all but .parquet may be compressed ({', '.join(COMPRESSIONS)})"
_ARCHIVES = {".zip", ".tar", ".tgz", ".7z", ".rar"}
_NOTES = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}  # files that `datasets` writes beside the data
_SYSTEM_FOLDERS = {"__MACOSX"}  # added to archives by macOS
_SHOWN = 5  # names in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusFile:
    """One file of a corpus."""

    path: Path
    name: str  # below the corpus's folder, with "/" between folders; "." if the corpus is this one file
    kind: Kind
    compression: str | None  # one of COMPRESSIONS' values
    size: int  # bytes on disk
    state: tuple[int, ...]  # changes when the file changes, even if its time is set back

    @property
    def where(self) -> str:
        """Its path, for messages."""
        return as_text(self.path)

    def digest(self) -> str:
        """SHA-256 (hex) of the file on disk.

        Raises:
            DataError: it changed since it was listed.
        """
        digest = file_digest(self.path)
        self.require_unchanged()
        return digest

    def require_unchanged(self) -> None:
        """Raise DataError if the file changed since it was listed."""
        try:
            unchanged = _state(self.path) == self.state
        except FileNotFoundError:
            unchanged = False
        if not unchanged:
            raise DataError(f"{self.where} changed while the corpus was read. Wait until nothing writes to it, and run again.")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileList:
    """The data files under a path, ordered by name, and the entries that are left out."""

    root: Path
    files: tuple[CorpusFile, ...]
    left_out: tuple[str, ...]  # name and reason of each

    def by_split(self, splits: Mapping[str, str | Sequence[str]] | None) -> dict[str, tuple[CorpusFile, ...]]:
        """The files of each split: those that the recipe names, or all as `train`.

        Args:
            splits: names of files or folders below the root for each split; `*` matches any characters except "/".

        Raises:
            DataError: an entry names no file, a file is in two splits, or the files are of several kinds.
        """
        if splits is None:
            return {"train": _of_one_kind(self.files, root=self.root)}
        chosen = {split: self._chosen([named] if isinstance(named, str) else named, split=split) for split, named in splits.items()}
        owner: dict[str, str] = {}
        for split, files in chosen.items():
            for file in files:
                if owner.setdefault(file.name, split) != split:
                    raise DataError(f"corpus.splits: {file.where} is in {owner[file.name]} and in {split}. Keep it in only one split.")
        _of_one_kind([file for files in chosen.values() for file in files], root=self.root)
        return chosen

    def _chosen(self, entries: Sequence[str], *, split: str) -> tuple[CorpusFile, ...]:
        found: dict[str, CorpusFile] = {}
        if not entries:
            raise DataError(f"corpus.splits.{split} names no file. Name files or folders below {self.root}, or remove it.")
        for entry in entries:
            matches = [file for file in self.files if _is_named(file.name, entry)]
            if not matches:
                raise DataError(f"corpus.splits.{split}: {entry!r} matches no data file in {self.root}, which holds {_some(self.files)}.")
            found |= {file.name: file for file in matches}
        return tuple(file for file in self.files if file.name in found)


def list_files(root: Path) -> FileList:
    """List the data files of a corpus: a file, or all below a folder.

    Raises:
        DataError: there is none, or a link is broken.
    """
    if root.is_file():
        kind, compression, reason = _what(root)
        if kind is None:
            raise DataError(f"{root} is not a data file ({reason}): {_READ}.")
        return FileList(root=root, files=(_listed(root, name=".", kind=kind, compression=compression),), left_out=())
    files, left_out = [], []
    for path, unread in _walk(root, root=root, above=(root.resolve(),)):
        name = path.relative_to(root).as_posix()
        kind, compression, why = (None, None, unread) if unread else _what(path)
        if kind is None:
            left_out.append(f"{as_text(name)} ({why})")
        else:
            files.append(_listed(path, name=name, kind=kind, compression=compression))
    if not files:
        also = f" It holds {listed(left_out, most=_SHOWN)}." if left_out else ""
        raise DataError(f"{root} holds no data files: {_READ}.{also}")
    return FileList(root=root, files=tuple(sorted(files, key=lambda file: file.path)), left_out=tuple(left_out))


def _walk(folder: Path, *, root: Path, above: tuple[Path, ...]) -> Iterator[tuple[Path, str | None]]:
    """Every file below a folder; entries that are left out have a reason. Links are followed inside the corpus, `root`.

    Raises:
        DataError: a link is broken, or leads out of the corpus: a stranger's corpus must not read the user's other files.
    """
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in _SYSTEM_FOLDERS:
            yield path, "hidden"
            continue
        if path.is_symlink() and not path.exists():
            raise DataError(f"{path} is a link to {os.readlink(path)}, which does not exist. Restore the target, or remove the link.")
        if path.is_dir() and path.resolve() in above:
            yield path, "a link to a folder above it"
            continue
        if path.is_symlink():
            require_inside(path, folder=root)
        if path.is_dir():
            if (path / "workspace.json").exists():
                yield path, "a workspace"
            else:
                yield from _walk(path, root=root, above=(*above, path.resolve()))
        else:
            yield path, None if path.is_file() else "not a regular file"


def _what(path: Path) -> tuple[Kind | None, str | None, str]:
    """Kind and compression of a file by its name, or why it is left out."""
    if path.name in _NOTES:
        return None, None, "a description of the data"
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    data = suffixes[-2:-1] if compression else suffixes[-1:]
    kind = KINDS.get(data[0]) if data else None
    if kind == "parquet" and compression:
        return None, None, "compressed Parquet is not read: decompress it"
    is_archive = bool(_ARCHIVES & set(suffixes))
    return kind, compression, "an archive: unpack it" if is_archive else "another kind of file"


def _listed(path: Path, *, name: str, kind: Kind, compression: str | None) -> CorpusFile:
    return CorpusFile(path=path, name=as_text(name), kind=kind, compression=compression, size=path.stat().st_size, state=_state(path))


def _state(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _is_named(name: str, entry: str) -> bool:
    """Whether an entry of `corpus.splits` names a file, or a folder above it."""
    entry = entry.removeprefix("./").rstrip("/")
    if name == entry or name.startswith(f"{entry}/"):
        return True
    pattern = "[^/]*".join(re.escape(piece) for piece in entry.split("*"))
    return "*" in entry and re.fullmatch(f"{pattern}(/.*)?", name, re.DOTALL) is not None


def _of_one_kind(files: Sequence[CorpusFile], *, root: Path) -> tuple[CorpusFile, ...]:
    kinds: dict[str, list[CorpusFile]] = {}
    for file in files:
        kinds.setdefault(file.kind, []).append(file)
    if len(kinds) > 1:
        each = "; ".join(f"{kind}: {_some(kinds[kind])}" for kind in sorted(kinds))
        raise DataError(
            f"{root} mixes files of several kinds ({', '.join(sorted(kinds))}). {each}. Move the files of one kind into a separate folder, "
            "or list the files to read in [corpus.splits]."
        )
    return tuple(files)


def _some(files: Sequence[CorpusFile]) -> str:
    return listed([file.name for file in files], most=_SHOWN)
