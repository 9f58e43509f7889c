"""A model folder as passed to transformers. transformers reads models only through this module, and no other files of the machine.

Some keys of config.json make transformers download code from the Hugging Face hub and run it, or read weights that were not checked.
They are removed, at any depth; transformers then uses its defaults.
"""

import json
import logging
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import DataError
from .model_files import check_model_files
from .model_json import MARK, read_json, without_mark
from .model_sizes import check_sizes
from .shown import in_short

# Implementations inside transformers; any other name may be, or fall back to, a kernel on the hub (`owner/name`).
_OWN_IMPLEMENTATIONS = {
    "attn_implementation": ("eager", "sdpa", "flex_attention"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}
# The second belongs to a configuration class: in a file it gives any other key the meaning of these keys or of sizes.
_NEVER_READ = ("transformers_weights", "attribute_map")
_CONFIG = "config.json"


@contextmanager
def for_transformers(folder: Path) -> Iterator[Path]:
    """The checked folder; or, if one of its JSON files must be changed for transformers, a temporary folder with links to the other files.

    A change is needed for a byte order mark, and for keys of config.json that are removed.

    Raises:
        DataError: the folder cannot be used: a file lies elsewhere, or config.json describes more than the weights hold.
    """
    check_model_files(folder)
    check_sizes(folder)
    changed = {path.name: without_mark(path) for path in folder.glob("*.json") if _starts_with_mark(path)}
    if (folder / _CONFIG).exists():
        try:
            config = read_json(folder / _CONFIG)
        except ValueError as error:
            raise DataError(f"{folder / _CONFIG} cannot be read: {error}. Download it again.") from error
        kept = without_hub_code(config)
        if kept != config:
            changed[_CONFIG] = json.dumps(kept).encode()
    if not changed:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="fuseline-model-") as temporary:
        for path in folder.iterdir():
            if path.name in changed:
                (Path(temporary) / path.name).write_bytes(changed[path.name])
            else:
                (Path(temporary) / path.name).symlink_to(path.absolute())
        yield Path(temporary)


@contextmanager
def quiet() -> Iterator[None]:
    """Turn off the progress bars and warnings of transformers, which quote a model's files unescaped; fuseline reports problems itself."""
    from transformers.utils import logging as its_logging

    its_logging.disable_progress_bar()
    before = its_logging.get_verbosity()
    its_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        its_logging.set_verbosity(before)


def completed_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The configuration of config.json, completed with the defaults of the model's class.

    Raises:
        DataError: transformers cannot read it; see also `for_transformers`.
    """
    with for_transformers(folder) as readable, quiet():
        return read_config(readable, of=folder, trust_remote_code=trust_remote_code)


def read_config(readable: Path, *, of: Path, trust_remote_code: bool = False) -> Any:
    """The same in a folder from `for_transformers`; `of` is the model's folder, for the message.

    Raises:
        DataError: transformers cannot read it.
    """
    from transformers import AutoConfig  # only here: its import takes seconds

    try:
        return AutoConfig.from_pretrained(readable, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # configuration classes raise any exception
        raise invalid_config(of, error) from error


def invalid_config(folder: Path, why: Exception | str) -> DataError:
    """The error for a config.json that transformers cannot read; the message of transformers may have several lines."""
    text = why if isinstance(why, str) else " ".join(in_short(why).split()).rstrip(".")
    return DataError(f"{folder / _CONFIG}: {text}; fix the file or download the model again.")


def without_hub_code(value: Any, *, also: Collection[str] = ()) -> Any:
    """The content of config.json without the keys, at any depth, that load code or other weights.

    Args:
        value: a config, or a part of one.
        also: more keys to leave out.
    """
    if isinstance(value, list):
        return [without_hub_code(each, also=also) for each in value]
    if not isinstance(value, dict):
        return value
    return {key: without_hub_code(each, also=also) for key, each in value.items() if key not in also and not _fetches(key, each)}


def _fetches(key: str, value: Any) -> bool:
    name = key.removeprefix("_").removesuffix("_internal")
    if name in _OWN_IMPLEMENTATIONS:
        return value not in (None, *_OWN_IMPLEMENTATIONS[name])
    return name in _NEVER_READ


def _starts_with_mark(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MARK)) == MARK
