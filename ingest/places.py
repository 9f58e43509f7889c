"""Finds a recipe's models: in a named folder, in the models folder, or in the cache of the Hugging Face hub."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..store.errors import DataError, UsageError
from ..store.inside import OutsideFolder, inside, lies_inside
from ..store.paths import expanded
from ..store.weights import weight_files
from .digests import snapshot_commit
from .hub import HUB_ID, cache_unwritable, is_cache_unwritable
from .model_config import ModelConfig

_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.py"]
# Files of a model that are read, besides its weights.
_READ = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_LONGEST_COMMIT = 100  # bytes of a line with a commit


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a model was found."""

    folder: Path
    by_name: bool = False  # in the models folder, by the last part of its id: it may be another owner's
    notes: tuple[str, ...] = ()  # for the user


def find_place(config: ModelConfig, *, models_dir: Path, base: Path, download: bool) -> Place:
    """The folder of a model: a path, else one in the models folder, else a snapshot of the hub.

    In the models folder `<owner>/<name>` and `<owner>--<name>` come before `<name>`, which may belong to any owner.

    Raises:
        DataError: the model is neither on this machine nor on a reachable hub, or it has a different revision.
        UsageError: `revision` is given for a named folder whose revision is not known.
    """
    named = base / expanded(config.model)
    if named.is_dir():
        if config.revision is not None and not _is_of_revision(named, config=config):
            raise UsageError(
                f"revision ({config.revision!r}) of the model {config.name}: {named} is a local folder, and {_what_is_known(named)}"
            )
        return Place(folder=named)
    by_name = models_dir / config.model.rsplit("/", 1)[-1]
    for candidate in (*_of_owner(config.model, models_dir=models_dir), by_name):
        if candidate.is_dir():
            return Place(folder=candidate, by_name=candidate == by_name, notes=_notes_of_revision(candidate, config=config))
    if not HUB_ID.fullmatch(config.model):
        raise DataError(f"The model {config.name}: there is no folder {(base / config.model).absolute()}. Correct the path.")
    return Place(folder=_snapshot(config, models_dir=models_dir, download=download))


def _of_owner(model: str, *, models_dir: Path) -> Iterator[Path]:
    if HUB_ID.fullmatch(model) and "/" in model and not model.startswith("."):
        yield models_dir / model
        yield models_dir / model.replace("/", "--")


def _snapshot(config: ModelConfig, *, models_dir: Path, download: bool) -> Path:
    import huggingface_hub

    try:
        snapshot = huggingface_hub.snapshot_download(
            config.model, revision=config.revision, allow_patterns=_HUB_FILES, local_files_only=not download
        )
    except Exception as error:  # a dozen exception types, from bad ids to no network
        if is_cache_unwritable(error):
            raise cache_unwritable(error) from error
        raise DataError(
            f"The model {config.name} ({config.model}) is not a local folder, not in the models folder {models_dir}, and not on the "
            f"Hugging Face hub ({type(error).__name__}: {str(error).splitlines()[0]}). Download it and name its folder in the recipe, "
            f"or put it into a folder as {config.model.rsplit('/', 1)[-1]} and name that with --models."
        ) from error
    return Path(snapshot)


def _notes_of_revision(folder: Path, *, config: ModelConfig) -> tuple[str, ...]:
    if config.revision is None or _is_of_revision(folder, config=config):
        return ()
    return (
        f"fuseline uses {folder}, but does not know whether it is revision {config.revision!r}: {_what_is_known(folder)} "
        "`hf download --local-dir` writes the commit into the folder",
    )


def _what_is_known(folder: Path) -> str:
    """What is known of a folder's revision, as the end of a sentence, and what to do, as another sentence."""
    commits = sorted(_commits(folder))
    if not commits:
        return "nothing in it says which revision it is. Remove revision from the recipe."
    if len(commits) == 1:
        return f"its files are from the commit {commits[0]}. Set revision to it."
    return f"its files are from the commits {' and '.join(commits)}. Download all of them again."


def _is_of_revision(folder: Path, *, config: ModelConfig) -> bool:
    """Whether a local folder is known to have the recipe's revision; False if its revision is not known.

    Raises:
        DataError: it has a different one.
    """
    commits, revision = _commits(folder), config.revision or ""
    wanted = _commit_of_branch(folder, revision=revision) or revision
    is_commit = len(wanted) >= 7 and all(character in "0123456789abcdef" for character in wanted)
    if not commits or not is_commit:
        return False
    others = sorted(commit for commit in commits if not commit.startswith(wanted))
    if others:
        raise DataError(
            f"revision ({revision!r}) of the model {config.name} must be that of its folder {folder} ({others[0]}). Set it to that commit, "
            "or download the revision that you want."
        )
    return True


def _commits(folder: Path) -> set[str]:
    """The commits of a model's files, as recorded by `hf download`; files that are not read do not count."""
    commit = snapshot_commit(folder)
    if commit is not None:
        return {commit}
    read = {path.name for path in weight_files(folder)} | {name for name in _READ if (folder / name).exists()}
    paths = [folder / ".cache" / "huggingface" / "download" / f"{name}.metadata" for name in sorted(read)]
    notes = [path for path in paths if path.is_file() and lies_inside(path, folder=folder)]
    return {commit for commit in map(_first_line, notes) if commit.isalnum()}


def _first_line(note: Path) -> str:
    with note.open("rb") as file:
        return file.readline(_LONGEST_COMMIT).decode(errors="replace").strip()


def _commit_of_branch(folder: Path, *, revision: str) -> str | None:
    """The commit of a branch or tag, if the folder is in the cache of the hub."""
    if snapshot_commit(folder) is None:
        return None
    try:
        reference = inside(folder.absolute().parent.parent / "refs", revision)
    except OutsideFolder:
        return None
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None
