"""Checks that the configurations and tokenizers of models allow a merge."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...store.errors import DataError
from ...store.json_text import parse_json
from ...store.model_json import read_json, without_mark
from ...store.shown import shown
from ...store.transformers_folder import completed_config

# Suffixes of keys that do not affect the meaning of weights: the origin of a model, its training or sampling.
_NOTES = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "use_cache",
    "_token_id",
    "dropout",
    "initializer_range",
    "architectures",
    "auto_map",
)
_OF_VOCABULARY = "vocab_size"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """The configuration of a model from `config.json`."""

    label: str  # for messages
    folder: Path
    flat: Mapping[str, Any]  # by dotted key, completed by transformers
    is_complete: bool  # transformers knows the model

    @property
    def vocab_size(self) -> int | None:
        """Number of logits."""
        return next((self.flat[key] for key in (_OF_VOCABULARY, f"text_config.{_OF_VOCABULARY}") if key in self.flat), None)

    @property
    def is_tied(self) -> bool:
        """Whether the output layer is the embeddings."""
        return bool(self.flat.get("tie_word_embeddings", self.flat.get("text_config.tie_word_embeddings", False)))


def read_settings(folder: Path, *, label: str) -> ModelSettings:
    """Read `config.json`. If transformers knows the model, missing keys are completed and old key names are replaced.

    Raises:
        DataError: it cannot be read.
    """
    path = folder / "config.json"
    try:
        settings = read = read_json(path)
        model_type = settings["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{label}: {path} cannot be read as the configuration of a model ({shown(error)}).") from error
    from transformers import CONFIG_MAPPING

    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        try:
            settings = completed_config(folder).to_dict()
        except DataError as error:
            raise DataError(f"{label}: {error}") from error
    return ModelSettings(label=label, folder=folder, flat=dict(_flat(settings)), is_complete=settings is not read)


def require_one_architecture(reference: ModelSettings, other: ModelSettings) -> None:
    """Raise DataError unless both are equal, except for notes and the size of the vocabulary."""
    for key in ("model_type", *sorted(reference.flat.keys() | other.flat.keys())):
        if key.endswith((*_NOTES, _OF_VOCABULARY)):
            continue
        expected, found = reference.flat.get(key), other.flat.get(key)
        if expected != found:
            raise DataError(
                f"{key} of {other.label} ({shown(found)}) must equal that of {reference.label} ({shown(expected)}): "
                "only models of one architecture can be merged. If config.json is wrong, correct it."
            )


def compare_tokenizers(reference: ModelSettings, other: ModelSettings) -> list[str]:
    """Notes for the user on differences between two tokenizers in one merge.

    Raises:
        DataError: a row of the embeddings is a different token in each of them.
    """
    paths = [settings.folder / "tokenizer.json" for settings in (reference, other)]
    lacking = [settings.label for settings, path in zip((reference, other), paths, strict=True) if not path.exists()]
    if lacking:
        return [f"the tokenizers cannot be compared: {' and '.join(lacking)} has no tokenizer.json"]
    contents = [without_mark(path) for path in paths]
    if contents[0] == contents[1]:
        return []
    (tokens, added), (other_tokens, other_added) = (
        _tokens(content, label=settings.label) for content, settings in zip(contents, (reference, other), strict=True)
    )
    for index in sorted(tokens.keys() & other_tokens.keys()):
        if tokens[index] != other_tokens[index]:
            raise DataError(
                f"Token {index} of {other.label} ({shown(other_tokens[index])}) must be that of {reference.label} "
                f"({shown(tokens[index])}): their tokenizers differ, so the same row of their embeddings is a different "
                "token. Such models cannot be merged."
            )
    differing = [index for index in sorted(added.keys() | other_added.keys()) if added.get(index) != other_added.get(index)]
    if tokens != other_tokens:
        return [
            f"the tokenizers of {reference.label} and {other.label} have different numbers of tokens ({len(tokens)}, {len(other_tokens)})"
        ]
    if differing:
        index = differing[0]
        return [
            f"the tokenizers of {reference.label} and {other.label} differ in {len(differing)} added tokens, first {index} "
            f"({shown(added.get(index))}, {shown(other_added.get(index))})"
        ]
    return []


def _tokens(content: bytes, *, label: str) -> tuple[dict[int, str], dict[int, str]]:
    """Tokens by id: those of the vocabulary, and added tokens."""
    try:
        definition = parse_json(content)
        vocabulary = definition["model"]["vocab"]
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((entry[0], index) for index, entry in enumerate(vocabulary))
        return {index: token for token, index in pairs}, {token["id"]: token["content"] for token in definition.get("added_tokens", [])}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(f"{label}: tokenizer.json cannot be read ({shown(error)}).") from error


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
