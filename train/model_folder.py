"""Writes the files of a Hugging Face folder besides the weights: config, tokenizer, model card."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..store import durable
from ..store.model_files import check_model_files
from ..store.model_json import read_json, without_mark
from ..store.transformers_folder import completed_config, without_hub_code

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


_SETTINGS = "tokenizer_config.json"
_CODE = "auto_map"  # names classes in Python files of the folder or the hub


def copy_tokenizer(model_folder: Path, *, to: Path, chat_template: str | None = None) -> None:
    """Copy the files of the tokenizer, without keys that name code (`copy_config`).

    `chat_template` is the template of the training, if it is not the model's own.
    """
    check_model_files(model_folder)
    _copy(_TOKENIZER_FILES, model_folder, to=to)
    settings = read_json(to / _SETTINGS) if (to / _SETTINGS).exists() else {}
    if _CODE in settings:
        del settings[_CODE]
        durable.write_json(to / _SETTINGS, settings)
    if chat_template is not None:
        (to / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def tokenizer_files_digest(model_folder: Path) -> str:
    """SHA-256 (hex) of the files that `copy_tokenizer` copies."""
    check_model_files(model_folder)
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        if (model_folder / name).exists():
            content = (model_folder / name).read_bytes()
            digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def copy_config(model_folder: Path, *, to: Path, dtype: str, is_tied: bool | None = None) -> None:
    """Copy config.json, with the dtype of the weights, and the generation config.

    tie_word_embeddings is corrected if it differs from `is_tied`. Code of a model is not copied, and keys that name code, in the folder or
    on the hub, are removed, because everyone who loads the new model would run it.
    """
    check_model_files(model_folder)
    config = read_json(model_folder / "config.json")
    if is_tied is not None and is_tied != _says_tied(model_folder):
        config["tie_word_embeddings"] = is_tied
    for key in ("_name_or_path", "torch_dtype"):  # the second is the old name of dtype
        config.pop(key, None)
    durable.write_json(to / "config.json", without_hub_code(config, also=(_CODE,)) | {"dtype": dtype})
    _copy(("generation_config.json",), model_folder, to=to)


def _says_tied(model_folder: Path) -> bool:
    return bool(completed_config(model_folder).tie_word_embeddings)


def write_model_card(folder: Path, *, name: str, text: str, tags: str, sections: Mapping[str, Any]) -> None:
    """Write README.md: the model's name, a paragraph, and sections of JSON."""
    written = {title: json.dumps(content, indent=2, ensure_ascii=False) for title, content in sections.items()}
    body = "\n".join(f"## {title}\n\n```json\n{content}\n```\n" for title, content in written.items())
    header = f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [{tags}]\n---\n\n"
    (folder / "README.md").write_text(f"{header}# {name}\n\n{text}\n\n{body}", encoding="utf-8")


def _copy(names: tuple[str, ...], folder: Path, *, to: Path) -> None:
    for name in names:
        if (folder / name).exists():
            (to / name).write_bytes(without_mark(folder / name))
