"""What a product takes: bytes on disk, and operations of models."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

# Bytes per token on disk (benchmarks/store.py): scalars; and of each of the k entries its id, of two or four bytes, and its value.
_SCALAR_BYTES, _ID_BYTES_U16, _ID_BYTES_U32 = 6.4, 1.35, 1.44
_VALUE_BYTES = {"f16": 1.12, "q8": 0.74}
_SMALL_VOCABULARY = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a product takes, of a whole one; see `plan.PlannedStage`."""

    stored_bytes: float
    tokens: float = 0
    flops: float = 0  # operations of the models
    dtype: str = "float32"  # of their weights
    remark: str = ""  # that the plan adds to its title


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """How large a model is."""

    parameters: float
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSize:
    """How large a split of a corpus is."""

    text_bytes: int
    documents: int
    parts: int


class Sizes(Protocol):
    """How large the corpus and the models of a recipe are."""

    def text(self, product: Any, split: str) -> SplitSize:
        """One split of the corpus of a product."""

    def tokens(self, product: Any, split: str) -> float:
        """About how many tokens a split has."""

    def model(self, product: Any) -> ModelSize:
        """The model that a product reads the corpus with; models that are made have the target's size."""


def record_bytes(model: ModelSize, *, k: int, codec: Literal["f16", "q8"]) -> float:
    """Stored bytes of a position."""
    return _SCALAR_BYTES + k * entry_bytes(model, codec=codec)


def entry_bytes(model: ModelSize, *, codec: Literal["f16", "q8"]) -> float:
    """Stored bytes of an entry of a distribution."""
    return (_ID_BYTES_U16 if model.vocab_size <= _SMALL_VOCABULARY else _ID_BYTES_U32) + _VALUE_BYTES[codec]
