"""The files of a corpus: a local file or folder, or a dataset of the Hugging Face hub."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..store.errors import DataError, UsageError
from ..store.paths import as_text, expanded
from .dataset_card import require_named_inside
from .digests import snapshot_commit
from .files import COMPRESSIONS, KINDS, CorpusFile, FileList, list_files
from .formats import column_names, read_rows
from .hub import HUB_ID, cache_unwritable, is_cache_unwritable
from .rows import BATCH_ROWS, Columns, Rows, require_columns

_HUB_FILES = [*(f"*{kind}{packed}" for kind in KINDS for packed in ("", *COMPRESSIONS)), "README.md"]


class Table(Protocol):
    """A file of a corpus, or a split of a hub dataset."""

    @property
    def where(self) -> str:
        """For messages."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """The columns; for a JSON file those of its first rows."""
        ...

    def rows(self, columns: Columns) -> Iterator[Rows]:
        """All rows, a batch at a time.

        Raises:
            DataError: it cannot be read, lacks a column, or has an invalid row.
        """
        ...


class DataFiles(Protocol):
    """A corpus before it is read. It pickles, so that a worker reads the files that the coordinator listed."""

    @property
    def left_out(self) -> Sequence[str]:
        """Entries that are not read, with the reason."""
        ...

    @property
    def where(self) -> str:
        """For messages."""
        ...

    @property
    def size(self) -> str:
        """A short description of what is read."""
        ...

    def identity(self) -> dict[str, Any]:
        """What determines its content."""
        ...

    def splits(self) -> Mapping[str, Sequence[Table]]:
        """The tables of each split, in order."""
        ...

    def require_unchanged(self) -> None:
        """Raise DataError if it changed since it was listed."""
        ...


@dataclass(frozen=True, slots=True)
class FileTable:
    """A file of a local corpus."""

    file: CorpusFile

    @property
    def where(self) -> str:
        """The file's path."""
        return self.file.where

    @property
    def names(self) -> Sequence[str]:
        """See `Table.names`."""
        return column_names(self.file)

    def rows(self, columns: Columns) -> Iterator[Rows]:
        """See `Table.rows`."""
        return read_rows(self.file, columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFiles:
    """Local files."""

    listed: FileList
    files: Mapping[str, tuple[CorpusFile, ...]]  # by split

    @property
    def left_out(self) -> Sequence[str]:
        """Including data files that are in no split."""
        read = {file.name for files in self.files.values() for file in files}
        return [*self.listed.left_out, *(f"{file.name} (in no split)" for file in self.listed.files if file.name not in read)]

    @property
    def where(self) -> str:
        """The path of the file or folder."""
        return as_text(self.listed.root)

    @property
    def size(self) -> str:
        """Number of files, and bytes on disk."""
        read = [file for files in self.files.values() for file in files]
        return f"{len(read):,} file{'s' * (len(read) != 1)}, {sum(file.size for file in read):,} bytes on disk"

    def identity(self) -> dict[str, Any]:
        """The digest of each file, by its name below the corpus's folder."""
        return {"files": {file.name: file.digest() for files in self.files.values() for file in files}}

    def splits(self) -> Mapping[str, Sequence[Table]]:
        """See `DataFiles.splits`."""
        return {split: [FileTable(file) for file in files] for split, files in self.files.items()}

    def require_unchanged(self) -> None:
        """See `DataFiles.require_unchanged`."""
        for files in self.files.values():
            for file in files:
                file.require_unchanged()


class HubTable:
    """A split of a hub dataset, read by `datasets`."""

    def __init__(self, rows: Any, *, where: str) -> None:
        self._rows, self.where = rows, where

    @property
    def names(self) -> Sequence[str]:
        """See `Table.names`."""
        return self._rows.column_names

    def rows(self, columns: Columns) -> Iterator[Rows]:
        """See `Table.rows`."""
        require_columns(columns.required, names=self.names, where=self.where)
        wanted, row = [name for name in columns.all if name in self.names], 0
        for batch in self._rows.select_columns(wanted).with_format(None).iter(batch_size=BATCH_ROWS):
            numbers = range(row, row + len(batch[wanted[0]]))
            yield Rows.of(batch, where=self.where, unit="row", numbers=numbers, columns=columns)
            row = numbers.stop


@dataclass(frozen=True, slots=True)
class HubFiles:
    """A snapshot of a hub dataset; `datasets` determines its splits and files."""

    folder: Path
    name: str  # as in the recipe
    configuration: str | None
    left_out: Sequence[str] = ()

    @property
    def where(self) -> str:
        """The snapshot's folder."""
        return str(self.folder)

    @property
    def size(self) -> str:
        """The commit."""
        return f"commit {self.folder.name}"

    def identity(self) -> dict[str, Any]:
        """The commit, which is the folder's name."""
        return {"hub": self.name, "commit": self.folder.name}

    def splits(self) -> Mapping[str, Sequence[Table]]:
        """See `DataFiles.splits`."""
        return {split: [HubTable(rows, where=f"{self.folder}, split {split}")] for split, rows in self._load().items()}

    def require_unchanged(self) -> None:
        """Nothing to check: a commit does not change."""

    def _load(self) -> dict[str, Any]:
        """The splits.

        Raises:
            DataError: they cannot be read, or the dataset's description names files outside its folder.
        """
        import datasets

        datasets.disable_progress_bars()
        require_named_inside(self.folder)
        try:
            return dict(datasets.load_dataset(str(self.folder), name=self.configuration))
        except Exception as error:  # `datasets` wraps the exceptions of its readers
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> DataError:
        cause = error.__cause__ or error
        if is_cache_unwritable(cause):
            return cache_unwritable(cause)
        if isinstance(error, ValueError) and ("Config name is missing" in str(error) or "BuilderConfig" in str(error)):
            import datasets

            names = ", ".join(datasets.get_dataset_config_names(str(self.folder)))
            return DataError(f"corpus.configuration ({self.configuration}) must name one of the configurations of {self.name}: {names}.")
        return DataError(f"The corpus {self.folder} cannot be read: {type(cause).__name__}: {cause}")


def open_data_files(
    path: str,
    *,
    base: Path,
    splits: Mapping[str, str | Sequence[str]] | None = None,
    revision: str | None = None,
    configuration: str | None = None,
    download: bool = True,
) -> DataFiles:
    """The files of a local corpus, or a snapshot of a hub dataset.

    Args:
        path: a path, or an id on the hub.
        base: the recipe's folder, to which a path is relative.
        splits: the files of each split, for a local corpus.
        revision: commit, tag or branch on the hub.
        configuration: the hub dataset's configuration.
        download: whether files that are missing from the local cache may be downloaded.

    Raises:
        DataError: it is neither on this machine nor on a reachable hub, or its files are invalid.
        UsageError: a key does not apply to this kind of corpus.
    """
    local = base / expanded(path)
    if local.exists() and not snapshot_commit(local):
        for key, value in (("revision", revision), ("configuration", configuration)):
            if value is not None:
                raise UsageError(
                    f"corpus.{key} ({value!r}) is only for datasets of the hub, but corpus.path is {local}. Remove corpus.{key}."
                )
        listed = list_files(local)
        return LocalFiles(listed=listed, files=listed.by_split(splits))
    if splits is not None:
        raise UsageError(
            f"corpus.splits is only for local files, but corpus.path ({path}) is a dataset of the hub, which has splits. Remove it."
        )
    if local.exists() and revision is not None and not local.name.startswith(revision):
        raise UsageError(f"corpus.revision ({revision!r}) must be the commit of {local}. Correct one of them, or remove corpus.revision.")
    folder = local if local.exists() else _snapshot(path, local=local, revision=revision, download=download)
    return HubFiles(folder, path, configuration)


def _snapshot(path: str, *, local: Path, revision: str | None, download: bool) -> Path:
    if not HUB_ID.fullmatch(path) or Path(path).suffix in {*KINDS, *COMPRESSIONS}:
        raise DataError(f"corpus.path: there is no file or folder {local.absolute()}. Correct the path in the recipe.")
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                path, repo_type="dataset", revision=revision, allow_patterns=_HUB_FILES, local_files_only=not download
            )
        )
    except Exception as error:  # a dozen exception types, from bad ids to no network
        if is_cache_unwritable(error):
            raise cache_unwritable(error) from error
        raise DataError(
            f"corpus.path ({path}): there is no file or folder {local.absolute()}, and the Hugging Face hub gave no dataset with this "
            f"id ({type(error).__name__}: {str(error).splitlines()[0]}). Correct the path, or download the dataset and name its folder."
        ) from error
