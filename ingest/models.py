"""The models of a recipe: their folders and their identities."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..store.errors import DataError
from ..store.model_files import check_model_files
from ..store.model_json import read_json
from ..store.model_sizes import check_sizes
from ..store.shown import shown
from ..store.tied import has_own_head
from ..store.tokenizer import Tokenizer
from ..store.transformers_folder import completed_config
from ..store.weights import EMBEDDINGS, refuse_adapter, tensors_of, unread_shards, weight_files
from .digests import file_digest
from .model_config import ModelConfig
from .places import find_place

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_NOTES_IN_CONFIG = {"_name_or_path", "transformers_version"}  # they describe a model's origin, not its content


@dataclass(frozen=True)
class ModelFolder:
    """A model's files in the Hugging Face format, checked."""

    config: ModelConfig
    folder: Path
    found_by_name: bool = False  # in the models folder, by the last part of its id: it may belong to another owner
    notes: tuple[str, ...] = ()  # for the user: how it was found
    kept_tokenizer: Tokenizer | None = None  # as an earlier version read it, if stored datasets use that

    @cached_property
    def hf_config(self) -> dict[str, Any]:
        """The model's `config.json`; for a multimodal model, the part about text."""
        try:
            config = read_json(self.folder / "config.json")
            found = config.get("text_config") or config
            if not isinstance(found, dict):
                raise ValueError("text_config is not an object")
            return found
        except (OSError, ValueError, AttributeError) as error:
            what = f"config.json cannot be read ({getattr(error, 'strerror', None) or error})"
            if next(self.folder.glob("*.gguf"), None) is not None:
                what = "it holds GGUF, which is not supported"
            raise DataError(
                f"{self.folder} is not a model folder: {what}. Name a folder with config.json and safetensors files."
            ) from error

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files that hold the weights, by name."""
        return weight_files(self.folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.kept_tokenizer or Tokenizer.from_model_folder(self.folder, prepends_bos=self.config.prepends_bos)

    @cached_property
    def weights_digest(self) -> str:
        """SHA-256 (hex) of the weights and of the config that says how to use them, independent of the folder's path."""
        code = sorted(self.folder.glob("*.py")) if self.config.trust_remote_code else []
        digests = [file_digest(path) for path in (*self.weight_files, *code)]
        config = read_json(self.folder / "config.json")
        settings = {name: value for name, value in config.items() if name not in _NOTES_IN_CONFIG}
        return hashlib.sha256(json.dumps([digests, settings], sort_keys=True).encode()).hexdigest()

    @cached_property
    def tensors(self) -> dict[str, dict[str, Any]]:
        """Name to dtype and shape of every tensor, from the headers of the safetensors files."""
        found: dict[str, dict[str, Any]] = {}
        for path in self.weight_files:
            found |= tensors_of(path)
        return found

    @property
    def vocab_size(self) -> int:
        """Number of logits, from `config.json`."""
        return int(self.hf_config["vocab_size"])

    @property
    def origin(self) -> dict[str, Any]:
        """A description of the model for model cards, without paths on this machine."""
        said = Path(self.config.model)
        is_path = said.is_absolute() or said.parts == self.folder.parts[-len(said.parts) :] or self.config.model.startswith((".", "~"))
        return {
            "model": self.folder.name if is_path else self.config.model,
            "revision": self.config.revision,
            "weights": self.weights_digest,
        }

    @property
    def _said(self) -> str:
        """Name, id and revision from the recipe, for messages."""
        revision = f", revision {self.config.revision}" if self.config.revision else ""
        return f"{self.config.name} ({self.config.model}{revision})"

    @property
    def context_length(self) -> int | None:
        """Most tokens that the model reads, from `config.json`; None if it is not there."""
        return self.hf_config.get("max_position_embeddings") or self.hf_config.get("max_seq_len")

    @property
    def stored_dtype(self) -> str:
        """The number format of the weights, from `config.json`.

        Raises:
            DataError: models cannot be run in it.
        """
        found = self.hf_config.get("dtype") or self.hf_config.get("torch_dtype") or "float32"
        if found not in _DTYPES:
            raise DataError(f"{self.folder}/config.json: dtype ({shown(found)}) must be one of {', '.join(_DTYPES)}. Correct config.json.")
        return found

    @property
    def n_parameters(self) -> int:
        """Number of weights in the files."""
        return sum(math.prod(tensor["shape"]) for tensor in self.tensors.values())

    def check(self) -> "ModelFolder":
        """Check that the folder can be used.

        Raises:
            DataError: config, weights and tokenizer disagree, weights are missing, or their format is not supported.
            OutsideFolder: a file is a link out of the folder.
        """
        check_model_files(self.folder)
        refuse_adapter(self.folder)
        self._refuse_quantized()
        self._check_config()
        check_sizes(self.folder)
        for name, tensor in self.tensors.items():
            if name.endswith(EMBEDDINGS) and tensor["shape"][:1] != [self.vocab_size]:
                raise DataError(
                    f"{self.folder}: vocab_size of config.json ({self.vocab_size}) must equal the rows of {name} in the weights "
                    f"({next(iter(tensor['shape']), 0)}). Correct config.json, or save the model again."
                )
        if self.tokenizer.largest_id >= self.vocab_size:
            raise DataError(
                f"{self.folder}: the largest id of the tokenizer ({self.tokenizer.largest_id}) must be below vocab_size of "
                f"config.json ({self.vocab_size}). The tokenizer is another model's, or tokens were added without resizing the embeddings."
            )
        return self

    def _check_config(self) -> None:
        """Check the keys of config.json that are read here."""
        size, length = self.hf_config.get("vocab_size"), self.context_length
        if type(size) is not int:
            raise DataError(f"{self.folder}/config.json has no vocab_size.")
        if length is not None and (type(length) is not int or length < 1):
            raise DataError(
                f"{self.folder}/config.json: max_position_embeddings ({shown(length)}) must be a whole number above 0. Correct config.json."
            )

    def _refuse_quantized(self) -> None:
        settings = self.hf_config.get("quantization_config") or read_json(self.folder / "config.json").get("quantization_config")
        if settings:
            method = shown(settings.get("quant_method") if isinstance(settings, dict) else None)
            raise DataError(
                f"{self.folder}/config.json says that the weights are quantized (quantization_config, quant_method = {method}). Quantized "
                "weights are not supported. Name the model in full precision, or convert it with transformers: model.dequantize(), then "
                "model.save_pretrained(…). If its weights are not quantized, remove quantization_config from config.json."
            )

    @cached_property
    def overrides_tying(self) -> bool:
        """Whether config.json ties the output layer to the embeddings, but a different one is stored, which then counts (`store.tied`)."""
        if self.hf_config.get("tie_word_embeddings") is False or not has_own_head(self.folder):
            return False
        config = completed_config(self.folder, trust_remote_code=self.config.trust_remote_code)
        return bool(getattr(config, "tie_word_embeddings", False))

    @property
    def start_digest(self) -> str:
        """Digest of the starting weights; different from that of earlier trainings that used the embeddings as the output layer."""
        return f"{self.weights_digest} with its own output layer" if self.overrides_tying else self.weights_digest

    @property
    def remarks(self) -> Iterator[str]:
        """Notes for the user on how the folder is read."""
        yield from self.notes
        if unread_shards(self.folder):
            yield "its folder holds model.safetensors and shards with an index; fuseline uses model.safetensors, as transformers does"
        if self.overrides_tying:
            yield (
                "config.json says tie_word_embeddings = true, but the stored output layer differs from the embeddings; fuseline uses the "
                "stored one, as transformers does. If that is right, set tie_word_embeddings = false in config.json"
            )


def find_model(config: ModelConfig, *, models_dir: Path, base: Path, download: bool = True) -> ModelFolder:
    """The checked folder of a model; `places` says where it is searched.

    Args:
        config: the recipe's entry.
        models_dir: folder with models (`--models`).
        base: the recipe's folder, to which paths in it are relative.
        download: whether files that are missing from the local cache may be downloaded.

    Raises:
        DataError: the model is neither on this machine nor on a reachable hub, it cannot be used, or it has a different revision.
        UsageError: `revision` is given for a folder whose revision is not known.
    """
    place = find_place(config, models_dir=models_dir, base=base, download=download)
    return ModelFolder(config, place.folder, found_by_name=place.by_name, notes=place.notes).check()


def require_different_folders(models: Iterable[ModelFolder]) -> None:
    """Raise DataError if models with different ids or revisions have the same folder, found by the last part of their ids."""
    first: dict[Path, ModelFolder] = {}
    for model in models:
        other = first.setdefault(model.folder.resolve(), model)
        are_same = (other.config.model, other.config.revision) == (model.config.model, model.config.revision)
        if not are_same and other.found_by_name and model.found_by_name:
            raise DataError(
                f"The models {other._said} and {model._said} are different, but both are found in the same folder, {model.folder}. "
                f"Rename it to {model.folder.parent}/<owner>--{model.folder.name}, and give each model its own folder."
            )
