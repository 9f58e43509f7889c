"""What the file of a merge asks for, in whichever format it is written."""

from dataclasses import dataclass

from ..ingest.model_config import ModelConfig
from ..train.merging.config import MergeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRequest:
    """What a file asks for."""

    config: MergeConfig
    base: ModelConfig | None
    models: tuple[ModelConfig, ...]
    tokenizer: str | None = None  # name of the model whose tokenizer is copied; None: the base's
    n_layers: int | None = None  # layers that the models must have, where the file says which ones are merged
