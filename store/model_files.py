"""The files of a model folder. The folder may be a stranger's, so files outside it are never read.

Links inside the folder, and links of a snapshot in the Hugging Face cache to its blobs, count as files (`inside`).
"""

from collections.abc import Iterator
from pathlib import Path

from .errors import DataError
from .inside import require_inside

# Suffixes of the files that fuseline or transformers read, and that exports copy.
_READ = (".json", ".safetensors", ".jinja", ".txt", ".model", ".tiktoken", ".py", ".bin", ".gguf")
_TEMPLATES = "additional_chat_templates"  # a folder; transformers reads *.jinja in it


def check_model_files(folder: Path) -> None:
    """Check that the files of a model are regular files inside the folder.

    Raises:
        OutsideFolder: a file is a link out of the folder.
        DataError: a file is a folder, a pipe or a device.
    """
    for path in _read_files(folder):
        require_inside(path, folder=folder)
        if path.exists() and not path.is_file():
            raise DataError(f"{path} must be a regular file, but is a folder or a device. Download the model again.")


def _read_files(folder: Path) -> Iterator[Path]:
    yield from (path for path in folder.glob("*") if path.name.endswith(_READ))
    templates = folder / _TEMPLATES
    require_inside(templates, folder=folder)
    yield from templates.glob("*.jinja")
