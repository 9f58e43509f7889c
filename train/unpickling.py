"""Restricts what a rank unpickles to the metadata of checkpoints and the objects that ranks send each other, so that no code runs.

torch and Megatron-core unpickle both without limits, so anyone who can write a checkpoint, or reach a rank's port, could run code in the
rank. This module replaces their unpickler with one that only allows the few classes in both.
"""

import builtins
import contextlib
import io
import os
import pickle
import pickletools
import types
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Any

import torch
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint import filesystem

_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # environment variable: torch.load then allows only tensors, numbers, text and lists
_KNOWN = {
    "megatron.core.dist_checkpointing.mapping": {"ShardedObject", "ShardedTensor"},
    "torch": {"Size", *(str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype))},
    "torch.distributed.checkpoint.api": {"CheckpointException"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "LoadItemType", "LoadPlan", "ReadItem", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
    },
    "torch.distributed.checkpoint.storage": {"WriteResult"},
    "torch.serialization": {"_get_layout"},
    __name__: {"_Place"},
    "traceback": {"StackSummary"},  # a failing rank sends its error with the traceback to the others; see `_Place`
    "builtins": {name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, Exception)},
}  # fmt: skip


class _Place:
    """Replaces `traceback.FrameSummary`, which would read the file that it names."""

    filename, lineno, name, line, locals, end_lineno, colno, end_colno = "", 0, "", "", None, None, None, None

    def __init__(self, *_: object, **__: object) -> None:
        pass


class KnownClasses(pickle.Unpickler):
    """Raises UnpicklingError for every name that is not part of a checkpoint's metadata or the ranks' messages."""

    def find_class(self, module: str, name: str) -> Any:
        """The class with that name, if it is allowed."""
        if (module, name) == ("traceback", "FrameSummary"):
            return _Place
        if name not in _KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not in any checkpoint of fuseline")
        return super().find_class(module, name)


@contextlib.contextmanager
def known_classes_only() -> Iterator[None]:
    """Apply the restriction to everything that torch and Megatron-core load or receive in this process."""
    known = types.SimpleNamespace(**vars(pickle) | {"load": _read_description})
    before = distributed_c10d._unpickler, filesystem.pickle, os.environ.get(_WEIGHTS_ONLY)
    distributed_c10d._unpickler, filesystem.pickle, os.environ[_WEIGHTS_ONLY] = KnownClasses, known, "1"  # type: ignore[assignment]
    try:
        yield
    finally:
        distributed_c10d._unpickler, filesystem.pickle, _ = before
        os.environ.pop(_WEIGHTS_ONLY)
        os.environ |= {} if before[2] is None else {_WEIGHTS_ONLY: before[2]}


def _read_description(file: IO[bytes]) -> Any:
    """The `.metadata` of a checkpoint: the place of each tensor in its files.

    Raises:
        UnpicklingError: it is not valid metadata, or names files outside the checkpoint's folder.
    """
    data = file.read()
    for operation, value, _ in pickletools.genops(data):
        if "PUT" in operation.name and isinstance(value, int) and value > len(data):  # memory is allocated for that many objects
            raise pickle.UnpicklingError(f"it has an object with number {value:,}, but only {len(data):,} bytes")
    description = KnownClasses(io.BytesIO(data)).load()
    for place in description.storage_data.values():
        name = place.relative_path
        if not isinstance(name, str) or name in {"", ".", ".."} or PurePosixPath(name).name != name:
            raise pickle.UnpicklingError(f"it names the file {name!r}, which is not in its folder")
    return description
