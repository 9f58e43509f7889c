"""Which files a model folder may consist of. The folder may be a stranger's: nothing is read that lies elsewhere.

Links inside the folder, and those of a snapshot in the cache of the Hugging Face hub to its blobs, are as good as files (`inside`).
"""

from collections.abc import Iterator
from pathlib import Path

from .errors import DataError
from .inside import require_inside

# Ends of the names of files that fuseline or transformers read, and that exports copy.
_READ = (".json", ".safetensors", ".jinja", ".txt", ".model", ".tiktoken", ".py", ".bin", ".gguf")
_TEMPLATES = "additional_chat_templates"  # a folder, of which transformers reads *.jinja


def check_model_files(folder: Path) -> None:
    """Check where the files of a model really lie.

    Raises:
        OutsideFolder: one is a link that leads out of the folder.
        DataError: one is a folder, a pipe or a device.
    """
    for path in _read_files(folder):
        require_inside(path, folder=folder)
        if path.exists() and not path.is_file():
            raise DataError(f"{path} must be a file, and is a folder or a device. Download the model again.")


def _read_files(folder: Path) -> Iterator[Path]:
    yield from (path for path in folder.glob("*") if path.name.endswith(_READ))
    templates = folder / _TEMPLATES
    require_inside(templates, folder=folder)
    yield from templates.glob("*.jinja")
