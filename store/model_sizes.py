"""Checks config.json against the size of the weights, before a model is built from it.

A model is built layer by layer from config.json. A number with extra zeros would take hours and all memory before the missing weights
are noticed. The weights on disk limit what the model can have.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import DataError
from .model_json import read_json
from .shown import shown
from .weights import tensors_of, weight_files

# Numbers of modules that are built one by one, and side lengths of tensors.
_COUNTS = {
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers", "decoder_layers", "num_encoder_layers"),
    *("num_experts", "num_local_experts", "n_routed_experts"),
}
_SIZES = {
    *("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "intermediate_size", "moe_intermediate_size", "n_inner", "ffn_dim"),
    *("ffn_hidden_size", "num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads", "head_dim", "vocab_size"),
}
_POSITIONS = {"n_positions", "max_position_embeddings", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length"}
HARMLESS_COUNT = 1000  # layers that config.json may describe without as many tensors: another check names the real mistake
HARMLESS_SIZE = 1 << 16
HARMLESS_POSITIONS = 1 << 24  # some models keep a table of positions that is not among the weights; the longest published have 10 million


def check_sizes(folder: Path) -> None:
    """Compare the numbers in config.json, at any depth, with the tensors in the headers of the weights.

    Raises:
        DataError: there are more layers than tensors, a size is larger than every side of a tensor, or a header cannot be read.
    """
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):  # its reader reports it
        return
    found = [(key, value) for key, value in _numbers(config) if _is_large(key, value)]
    if not found:
        return
    tensors = [tensor for path in weight_files(folder) for tensor in tensors_of(path).values()]
    largest = max((side for tensor in tensors for side in tensor["shape"]), default=0)
    for key, value in found:
        if key in _COUNTS and value > len(tensors):
            raise _too_large(folder, key=key, value=value, of=f"number of tensors in the weights ({len(tensors):,})")
        if key in _SIZES | _POSITIONS and value > largest:
            raise _too_large(folder, key=key, value=value, of=f"largest side of a tensor in the weights ({largest:,})")


def _is_large(key: str, value: float) -> bool:
    limits = ((_COUNTS, HARMLESS_COUNT), (_SIZES, HARMLESS_SIZE), (_POSITIONS, HARMLESS_POSITIONS))
    return any(key in keys and value > limit for keys, limit in limits)


def _too_large(folder: Path, *, key: str, value: float, of: str) -> DataError:
    return DataError(
        f"{folder}/config.json: {key} ({shown(value)}) must be at most the {of}. Correct config.json, or download the model again."
    )


def _numbers(config: Any) -> Iterator[tuple[str, float]]:
    """The numbers of a config and of its nested configs, with their keys."""
    for key, value in config.items() if isinstance(config, Mapping) else ():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, int | float):
            yield key, value
