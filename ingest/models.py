"""The models of a recipe: where their files are, and what identifies them."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..store.errors import DataError
from ..store.tokenizer import Tokenizer
from ..store.weights import EMBEDDINGS, tensors_of, weight_files
from .digests import file_digest
from .sources import HUB_ID

_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.py"]
_NOTES_IN_CONFIG = {"_name_or_path", "transformers_version"}  # they say where a model came from, not what it is


class ModelConfig(BaseModel):
    """The `[target]` or one of the `[[sources]]` of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(pattern=r"^[A-Za-z0-9]+([._-][A-Za-z0-9]+)*$", description="name of the model in the workspace")
    model: str = Field(description="model id on the Hugging Face hub, or a folder in its format (safetensors)")
    revision: str | None = Field(None, description="commit, tag or branch of a hub model; a local folder is taken as it is")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="number format of the weights in forward passes; docs/machines.md says what they are computed in"
    )
    prepends_bos: bool | None = Field(None, description="start each segment with bos; by default as the model's tokenizer does")
    chat_template: Literal["shared", "own"] = Field(
        "shared",
        description="of a source, with [corpus.chat]: it reads conversations as the corpus has them, or in its own chat template",
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    expected_parameters: float | None = Field(None, gt=0, description="for --dry-run where the model is not at hand")
    expected_vocab_size: int | None = Field(None, gt=0, description="for --dry-run where the model is not at hand")


@dataclass(frozen=True)
class ModelFolder:
    """A model's files in the Hugging Face format, checked."""

    config: ModelConfig
    folder: Path

    @cached_property
    def hf_config(self) -> dict[str, Any]:
        """The model's `config.json`; of a multimodal model, the part about text."""
        try:
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            return config.get("text_config", config)
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f"{self.folder} is not a model folder: config.json cannot be read ({error}).") from error

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files that hold the weights, by name."""
        return weight_files(self.folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return Tokenizer.from_model_folder(self.folder, prepends_bos=self.config.prepends_bos)

    @cached_property
    def weights_digest(self) -> str:
        """SHA-256 (hex) of the weights and of the config that says how to use them; the folder's name and place do not matter."""
        code = sorted(self.folder.glob("*.py")) if self.config.trust_remote_code else []
        digests = [file_digest(path) for path in (*self.weight_files, *code)]
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
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
        """Number of logits, as `config.json` says."""
        return int(self.hf_config["vocab_size"])

    @property
    def origin(self) -> dict[str, Any]:
        """What the model is, for the cards of others; not where it lies on this machine."""
        said = Path(self.config.model)
        is_path = said.is_absolute() or said.parts == self.folder.parts[-len(said.parts) :] or self.config.model.startswith((".", "~"))
        return {
            "model": self.folder.name if is_path else self.config.model,
            "revision": self.config.revision,
            "weights": self.weights_digest,
        }

    @property
    def context_length(self) -> int | None:
        """Most tokens that the model reads, as `config.json` says; None where it does not."""
        return self.hf_config.get("max_position_embeddings") or self.hf_config.get("max_seq_len")

    @property
    def n_parameters(self) -> int:
        """Number of weights in the files."""
        total = 0
        for tensor in self.tensors.values():
            size = 1
            for length in tensor["shape"]:
                size *= length
            total += size
        return total

    def check(self) -> "ModelFolder":
        """Raise DataError where config, weights and tokenizer disagree, or the weights are not all there."""
        if not isinstance(self.hf_config.get("vocab_size"), int):
            raise DataError(f"{self.folder}/config.json says no vocab_size.")
        for name, tensor in self.tensors.items():
            if name.endswith(EMBEDDINGS) and tensor["shape"][0] != self.vocab_size:
                raise DataError(
                    f"{self.folder}: vocab_size of config.json ({self.vocab_size}) must equal the rows of {name} in the weights "
                    f"({tensor['shape'][0]}). Correct config.json, or save the model again."
                )
        if self.tokenizer.largest_id >= self.vocab_size:
            raise DataError(
                f"{self.folder}: the largest id of the tokenizer ({self.tokenizer.largest_id}) must be below vocab_size of "
                f"config.json ({self.vocab_size}). The tokenizer is another model's, or tokens were added without resizing the embeddings."
            )
        return self


def find_model(config: ModelConfig, *, models_dir: Path, base: Path, download: bool = True) -> ModelFolder:
    """The folder of a model, checked: a path, else `models_dir/<last part of the id>`, else a snapshot of the hub's.

    Args:
        config: the recipe's entry.
        models_dir: folder with models by the last part of their hub id (`--models`).
        base: the recipe's folder, to which paths in it are relative.
        download: whether the hub may be asked for what its local cache lacks.

    Raises:
        DataError: the model is neither here nor on a hub that can be reached, or it cannot be used.
    """
    for candidate in (base / Path(config.model).expanduser(), models_dir / config.model.rsplit("/", 1)[-1]):
        if candidate.is_dir():
            return ModelFolder(config, candidate).check()
    if not HUB_ID.fullmatch(config.model):
        raise DataError(f"The model {config.name}: there is no folder {(base / config.model).absolute()}. Correct the path.")
    import huggingface_hub

    try:
        snapshot = huggingface_hub.snapshot_download(
            config.model, revision=config.revision, allow_patterns=_HUB_FILES, local_files_only=not download
        )
    except Exception as error:  # a dozen kinds, from bad ids to no network
        raise DataError(
            f"The model {config.name} ({config.model}) is not a folder here, not in the models folder {models_dir}, and the Hugging Face "
            f"hub did not give it ({type(error).__name__}: {str(error).splitlines()[0]}). Download it and name its folder in the recipe, "
            f"or put it into a folder as {config.model.rsplit('/', 1)[-1]} and name that with --models."
        ) from error
    return ModelFolder(config, Path(snapshot)).check()
