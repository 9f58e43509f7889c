"""What a merge file asks for, independent of its format."""

from dataclasses import dataclass

from ..ingest.model_config import ModelConfig
from ..train.merging.config import MergeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRequest:
    """The content of a merge file."""

    config: MergeConfig
    base: ModelConfig | None
    models: tuple[ModelConfig, ...]
    tokenizer: str | None = None  # name of the model whose tokenizer is copied; None: the base's
    n_layers: int | None = None  # number of layers that the models must have, if the file states it
