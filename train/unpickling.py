"""What a rank unpickles: the descriptions of checkpoints, and the objects that ranks send each other. Nothing that runs code.

torch and Megatron-core unpickle both without limits: whoever could write a checkpoint, or reach a rank's port, could run code in the rank.
Here an unpickler takes their place that knows the few classes of which both consist.
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

_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # in the environment: torch.load then knows nothing but tensors, numbers, text and lists
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
    "traceback": {"StackSummary"},  # a rank that fails sends its error to the others, with the places in the code; see `_Place`
    "builtins": {name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, Exception)},
}  # fmt: skip


class _Place:
    """Stands for `traceback.FrameSummary`, which reads the file that it names."""

    filename, lineno, name, line, locals, end_lineno, colno, end_colno = "", 0, "", "", None, None, None, None

    def __init__(self, *_: object, **__: object) -> None:
        pass


class KnownClasses(pickle.Unpickler):
    """Raises UnpicklingError at the name of anything that is neither part of a checkpoint's description nor of the ranks' messages."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of that name, if it is known."""
        if (module, name) == ("traceback", "FrameSummary"):
            return _Place
        if name not in _KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which no checkpoint of fuseline has")
        return super().find_class(module, name)


@contextlib.contextmanager
def known_classes_only() -> Iterator[None]:
    """Unpickle nothing else in this process, whatever torch and Megatron-core load or receive."""
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
    """The `.metadata` of a checkpoint: which tensors lie where in its files.

    Raises:
        UnpicklingError: it is something else, or names files outside the checkpoint's folder.
    """
    data = file.read()
    for operation, value, _ in pickletools.genops(data):
        if "PUT" in operation.name and isinstance(value, int) and value > len(data):  # memory is taken for as many objects
            raise pickle.UnpicklingError(f"it numbers an object {value:,}, and has {len(data):,} bytes")
    description = KnownClasses(io.BytesIO(data)).load()
    for place in description.storage_data.values():
        name = place.relative_path
        if not isinstance(name, str) or name in {"", ".", ".."} or PurePosixPath(name).name != name:
            raise pickle.UnpicklingError(f"it names the file {name!r}, which is not in its folder")
    return description
