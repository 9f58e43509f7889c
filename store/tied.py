"""Whether a model's output layer is its embeddings, by the rule of transformers, which uses config.json and the stored tensors.

    tie_word_embeddings   stored                            the output layer is
    false                 both                              its own
    false                 embeddings only                   missing: transformers fills it with random numbers; fuseline refuses the model
    true                  one of them                       the embeddings
    true                  both, with equal values           the embeddings
    true                  both, with different values       its own, despite config.json

If config.json does not say it, the default of the model's class counts.
"""

from pathlib import Path

from .weights import EMBEDDINGS, tensors_of, weight_files

HEADS = ("lm_head.weight", "embed_out.weight")  # suffixes of the names of output layers
_ROWS = 4096  # of both tensors, compared at a time


def is_tied(folder: Path, *, says_tied: bool) -> bool:
    """Whether embeddings and output layer are one tensor; `says_tied` is the value in the completed config.json."""
    return says_tied and not has_own_head(folder)


def has_own_head(folder: Path) -> bool:
    """Whether embeddings and output layer are both stored and differ.

    Raises:
        DataError: the weights cannot be read.
    """
    file_of = {name: path for path in weight_files(folder) for name in tensors_of(path)}
    heads, embeddings = ([name for name in file_of if name.endswith(ends)] for ends in (HEADS, EMBEDDINGS))
    return bool(heads and embeddings) and not _have_equal_values((file_of[heads[0]], heads[0]), (file_of[embeddings[0]], embeddings[0]))


def _have_equal_values(*places: tuple[Path, str]) -> bool:
    import torch  # only here: few folders hold both
    from safetensors import safe_open

    one, other = (safe_open(path, framework="pt").get_slice(name) for path, name in places)
    shape: list[int] = one.get_shape()
    if shape != other.get_shape():
        return False
    pieces = ((one[row : row + _ROWS], other[row : row + _ROWS]) for row in range(0, shape[0], _ROWS))
    return all(torch.equal(a_NH, b_NH.to(a_NH.dtype)) for a_NH, b_NH in pieces)
