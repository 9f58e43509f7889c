"""The cost of a product: bytes on disk, and operations of models."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

# Bytes per token on disk (benchmarks/store.py): scalars, and for each of the k entries its id (two or four bytes) and its value.
_SCALAR_BYTES, _ID_BYTES_U16, _ID_BYTES_U32 = 6.4, 1.35, 1.44
_VALUE_BYTES = {"f16": 1.12, "q8": 0.74}
_SMALL_VOCABULARY = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The cost of a whole product; see `plan.PlannedStage`."""

    stored_bytes: float
    tokens: float = 0
    flops: float = 0  # floating-point operations of the models
    dtype: str = "float32"  # number format of their weights
    remark: str = ""  # the plan adds it to the title


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """The size of a model."""

    parameters: float
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSize:
    """The size of a split of a corpus."""

    text_bytes: int
    documents: int
    parts: int


class Sizes(Protocol):
    """The sizes of the corpus and the models of a recipe."""

    def text(self, product: Any, split: str) -> SplitSize:
        """The size of one split of a product's corpus."""

    def tokens(self, product: Any, split: str) -> float:
        """The approximate number of tokens of a split."""

    def model(self, product: Any) -> ModelSize:
        """The size of the model with which a product reads the corpus. Models that the recipe makes have the target's size."""


def record_bytes(model: ModelSize, *, k: int, codec: Literal["f16", "q8"]) -> float:
    """Stored bytes per position."""
    return _SCALAR_BYTES + k * entry_bytes(model, codec=codec)


def entry_bytes(model: ModelSize, *, codec: Literal["f16", "q8"]) -> float:
    """Stored bytes per entry of a distribution."""
    return (_ID_BYTES_U16 if model.vocab_size <= _SMALL_VOCABULARY else _ID_BYTES_U32) + _VALUE_BYTES[codec]
