"""Plans a merge, tensor by tensor, from headers and configurations. Models that cannot be merged are refused here."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from ...store.errors import DataError, UsageError
from ...store.tied import HEADS, has_own_head
from ...store.weights import EMBEDDINGS
from ..weight_files import BUFFERS, FlatTensor, flat_tensors
from .config import MergeConfig
from .configs import ModelSettings, compare_tokenizers, read_settings, require_one_architecture

BLOCK = 1 << 18  # positions of a tensor in memory at a time; even, because each draw for DARE serves two
_NAMED = 3  # tensors that a message names


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """A tensor of the merged model."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    reference: FlatTensor  # the base's; without a base, the first model's
    models: tuple[FlatTensor, ...]  # empty: it is copied
    n_merged: int  # positions that are merged; the others are copied from the reference


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """The plan of a possible merge."""

    reference: Path  # folder with the merged model's config
    tensors: tuple[PlannedTensor, ...]
    warnings: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        """Of the weights."""
        return sum(tensor.reference.n_positions * tensor.dtype.itemsize for tensor in self.tensors)

    @property
    def dtype(self) -> str:
        """Of most of the weights."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.tensors:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.reference.n_positions
        return str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    settings: ModelSettings
    tensors: Mapping[str, FlatTensor]

    @property
    def label(self) -> str:
        return self.settings.label


def plan_merge(
    config: MergeConfig, *, base: Path | None, models: Mapping[str, Path], tokenizer_of: Path | None, stack: ExitStack
) -> MergePlan:
    """Compare all models, and plan what to write. Files stay open until `stack` closes.

    Raises:
        UsageError: the settings do not fit the models.
        DataError: the models do not fit each other, or cannot be merged.
    """
    _require_fit(config, has_base=base is not None, names=list(models))
    folders = ([("the base", base)] if base else []) + [(f"model {name}", models[name]) for name in sorted(models)]
    read = [_read(folder, label=label, stack=stack) for label, folder in folders]
    reference, others = read[0], read[1:]
    warnings = list(_left_out(reference.settings))
    for other in others:
        require_one_architecture(reference.settings, other.settings)
        _require_same_names(reference, other)
        warnings += compare_tokenizers(reference.settings, other.settings)
    if tokenizer_of is not None and all(tokenizer_of != folder for _, folder in folders):
        warnings += compare_tokenizers(reference.settings, read_settings(tokenizer_of, label="tokenizer_of"))
    merged = read[1:] if base else read
    tensors = tuple(
        _planned(name, reference=reference, models=merged, has_base=base is not None, config=config) for name in reference.tensors
    )
    return MergePlan(reference=folders[0][1], tensors=tensors, warnings=tuple(warnings))


def _left_out(settings: ModelSettings) -> Iterator[str]:
    if not settings.is_complete and any(key.startswith("auto_map") for key in settings.flat):
        yield (
            f"config.json of {settings.label} names the model's own Python code (auto_map), which is not copied. If you trust the code, "
            "copy auto_map and the *.py files into the merged model to load it"
        )


def _require_fit(config: MergeConfig, *, has_base: bool, names: list[str]) -> None:
    for key in ("weights", "densities"):
        for name in getattr(config, key).keys() - set(names):
            raise UsageError(f"merge.{key}: {name!r} must be one of the models: {', '.join(sorted(names))}.")
    if config.needs_base and not has_base:
        raise UsageError(f"merge.base must be given for method = {config.method!r}. Name the model that the others were trained from.")
    if config.vocabulary == "common" and not has_base:
        raise UsageError("merge.base must be given for vocabulary = 'common', because rows that not all models have come from the base.")
    if len(names) < config.least_models:
        raise UsageError(f"The models ({len(names)}) must be at least {config.least_models} for method = {config.method!r}.")
    if config.most_models is not None and len(names) > config.most_models:
        raise UsageError(
            f"The models ({len(names)}) must be {config.most_models} for method = {config.method!r}, besides the base: "
            "it interpolates between the base and that model."
        )
    if config.normalizes and not sum(map(config.weight_of, names)):
        raise UsageError(f"merge.weights of {', '.join(sorted(names))} must not sum to 0 if normalize is true.")


def _read(folder: Path, *, label: str, stack: ExitStack) -> _Model:
    settings = read_settings(folder, label=label)
    tensors = flat_tensors(folder, stack=stack)
    heads = [name for name in tensors if name.endswith(HEADS)]
    if settings.is_complete and not settings.is_tied and not heads and any(name.endswith(EMBEDDINGS) for name in tensors):
        raise DataError(
            f"{label} has no output layer, but its config.json does not tie it to the embeddings. Download its weights again, or set "
            "tie_word_embeddings = true in config.json."
        )
    if settings.is_tied and heads:
        if has_own_head(folder):
            raise DataError(
                f"{label} stores an output layer, {heads[0]}, that differs from its embeddings, but its config.json says "
                "tie_word_embeddings = true. transformers uses the stored one. Set tie_word_embeddings = false in config.json, or remove "
                f"{heads[0]} from the weights if the embeddings are the output layer."
            )
        if any(name.endswith(EMBEDDINGS) for name in tensors):
            for head in heads:
                del tensors[head]  # a copy that readers of the model make themselves
    return _Model(settings=settings, tensors=tensors)


def _require_same_names(reference: _Model, other: _Model) -> None:
    for has, lacks in ((reference, other), (other, reference)):
        names = [name for name in has.tensors if name not in lacks.tensors and not name.endswith(BUFFERS)]
        if names:
            shown = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
            raise DataError(
                f"{lacks.label} must have the tensors of {has.label}, but lacks {shown}: only models of one architecture can be "
                "merged (an adapter must be merged into its model first)."
            )


def _planned(name: str, *, reference: _Model, models: list[_Model], has_base: bool, config: MergeConfig) -> PlannedTensor:
    tensor = reference.tensors[name]
    holders = [model for model in models if name in model.tensors]  # a buffer may be in only some models
    found = tuple(model.tensors[name] for model in holders)
    for model, other in zip(holders, found, strict=True):
        _require_shape(name, reference=reference, model=model, config=config)
        if other.dtype.is_floating_point != tensor.dtype.is_floating_point:
            raise DataError(
                f"{name}: the dtype of {model.label} ({other.dtype}) must be of the kind of {reference.label} ({tensor.dtype})."
            )
    if name.endswith(BUFFERS) or not tensor.dtype.is_floating_point:
        for model, other in zip(holders, found, strict=True):
            if not _equal(tensor, other):
                raise DataError(
                    f"{name} ({tensor.dtype}) does not hold weights and must be equal in all models, but differs between "
                    f"{reference.label} and {model.label}: it cannot be merged."
                )
        found = ()
    if not found:
        return PlannedTensor(name=name, shape=tensor.shape, dtype=tensor.dtype, reference=tensor, models=(), n_merged=0)
    dtype = found[0].dtype
    for other in found[1:]:
        dtype = torch.promote_types(dtype, other.dtype)
    return PlannedTensor(
        name=name,
        shape=tensor.shape,
        dtype=dtype if config.dtype is None else getattr(torch, config.dtype),
        reference=tensor,
        models=found,
        n_merged=min(part.n_positions for part in (tensor, *found)),
    )


def _require_shape(name: str, *, reference: _Model, model: _Model, config: MergeConfig) -> None:
    expected, found = reference.tensors[name].shape, model.tensors[name].shape
    if expected == found:
        return
    sizes = [reference.settings.vocab_size, model.settings.vocab_size]
    if expected[1:] == found[1:] and [expected[0], found[0]] == sizes:
        if config.vocabulary == "common":
            return
        raise DataError(
            f"vocab_size of {model.label} ({sizes[1]}) must equal that of {reference.label} ({sizes[0]}). To merge the rows of {name} that "
            "all models have, and to take the others from the base, set vocabulary = 'common'."
        )
    raise DataError(f"{name}: the shape of {model.label} {list(found)} must equal that of {reference.label} {list(expected)}.")


def _equal(one: FlatTensor, other: FlatTensor) -> bool:
    if one.shape != other.shape:
        return False
    return all(torch.equal(a_N, b_N.to(a_N.dtype)) for a_N, b_N in zip(pieces_of(one), pieces_of(other), strict=True))


def pieces_of(tensor: FlatTensor, *, start: int = 0) -> Iterator[torch.Tensor]:
    """The positions of a tensor from `start` on, in blocks."""
    for first, last in ranges(start, tensor.n_positions):
        yield tensor.read(first, last)


def ranges(start: int, stop: int) -> Iterable[tuple[int, int]]:
    """Beginnings and ends of blocks."""
    return ((first, min(first + BLOCK, stop)) for first in range(start, stop, BLOCK))
