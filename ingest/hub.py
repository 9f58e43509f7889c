"""Common to models and datasets of the Hugging Face hub: their ids, and the cache for downloads."""

import errno
import os
import re
from pathlib import Path
from typing import TypeGuard

from ..store.errors import DataError
from ..store.paths import expanded

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")  # of a model or a dataset


def is_cache_unwritable(error: BaseException) -> TypeGuard[OSError]:
    """Whether an error of the hub's libraries means that their cache cannot be written."""
    if not isinstance(error, OSError):
        return False
    return error.errno in {errno.EACCES, errno.EROFS} or Path(str(error.filename)).is_relative_to(_cache_folder())


def _cache_folder() -> Path:
    return Path(os.environ.get("HF_HOME") or expanded("~/.cache/huggingface"))


def cache_unwritable(error: OSError) -> DataError:
    """The message for a cache of the hub's libraries that cannot be written."""
    where = error.filename or _cache_folder()
    return DataError(f"The cache of the Hugging Face hub cannot be written ({error.strerror}: {where}). Set HF_HOME to a writable folder.")
