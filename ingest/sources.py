"""Where a corpus comes from: files or a folder, or a dataset of the Hugging Face hub; read through `datasets`."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..store.errors import DataError

_DATA_SUFFIXES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}
_NOTES = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}  # what `datasets` leaves beside the data
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")  # of a model or a dataset
_HUB_FILES = ["*.parquet", "*.jsonl", "*.jsonl.*", "*.json", "*.csv", "*.txt", "README.md"]


def find_source(path: str, *, revision: str | None, base: Path, download: bool = True) -> Path:
    """The file or folder of a corpus: a local path, or a snapshot of a hub's dataset.

    Args:
        path: a path, or an id on the hub.
        revision: commit, tag or branch on the hub.
        base: the recipe's folder, to which a path is relative.
        download: whether the hub may be asked for what its local cache lacks.

    Raises:
        DataError: it is neither here nor on a hub that can be reached.
    """
    local = base / Path(path).expanduser()
    if local.exists():
        return local
    if not HUB_ID.fullmatch(path):
        raise DataError(f"corpus.path: there is no file or folder {local.absolute()}. Correct the path in the recipe.")
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                path, repo_type="dataset", revision=revision, allow_patterns=_HUB_FILES, local_files_only=not download
            )
        )
    except Exception as error:  # a dozen kinds, from bad ids to no network
        raise DataError(
            f"corpus.path ({path}): there is no file or folder {local.absolute()}, and the Hugging Face hub did not give a dataset of this "
            f"id ({type(error).__name__}: {str(error).splitlines()[0]}). Correct the path, or download the dataset and name its folder."
        ) from error


def data_files(source: Path) -> list[Path]:
    """The files of a corpus that hold text, in a fixed order.

    Raises:
        DataError: there are none.
    """
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if _kind(path))
    if not files or not _kind(files[0]):
        raise DataError(f"{source} holds no data file: {', '.join(_DATA_SUFFIXES)} are read (also gzipped).")
    return files


def _kind(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix not in {".gz", ".zst"}]
    if path.name in _NOTES:
        return None
    return _DATA_SUFFIXES.get(suffixes[-1]) if suffixes and path.is_file() else None


def load_splits(source: Path) -> dict[str, Any]:
    """Load a file or folder through `datasets`: split name to `datasets.Dataset`, memory-mapped.

    Raises:
        DataError: a file cannot be read.
    """
    import datasets

    datasets.disable_progress_bars()
    kinds = {_kind(path) for path in data_files(source)}
    if len(kinds) > 1:
        raise DataError(f"{source} mixes files of several kinds ({', '.join(sorted(map(str, kinds)))}). Keep those of one kind.")
    (kind,) = kinds
    try:
        if kind == "text":
            files = [(str(path), path.stat().st_mtime_ns) for path in data_files(source)]  # the times keep its cache from going stale
            features = datasets.Features({"text": datasets.Value("large_string")})
            loaded = {"train": datasets.Dataset.from_generator(_text_documents, features=features, gen_kwargs={"files": files})}
        elif source.is_file():
            loaded = datasets.load_dataset(kind, data_files=str(source))
        else:
            loaded = datasets.load_dataset(str(source))
    except Exception as error:  # `datasets` wraps whatever its readers raise
        cause = error.__cause__ or error
        if isinstance(cause, StopIteration) or "corresponds to no data" in str(cause):  # what `datasets` says of a file without rows
            return {}
        raise DataError(f"The corpus {source} cannot be read: {type(cause).__name__}: {cause}") from error
    return dict(loaded)


def _text_documents(files: list[tuple[str, int]]) -> Iterator[dict[str, str]]:
    """One document per file, to the byte: the text reader of `datasets` turns carriage returns into line feeds."""
    import fsspec

    for path, _ in files:
        with fsspec.open(path, "rb", compression="infer") as file:
            data = file.read()
        try:
            yield {"text": data.decode()}
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not valid UTF-8 ({error}). Mend or remove it.") from error
