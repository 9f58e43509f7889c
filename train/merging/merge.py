"""Merges the models of several folders into a new one, tensor by tensor and block by block."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import MergeConfig

REPORT = "merge_report.json"
_STAGE = "merge/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What a merge did; `merge_report.json` in the folder holds it all."""

    output: Path
    models: tuple[str, ...]  # in the order of `TensorReport.weights`: sorted
    tensors: "tuple[TensorReport, ...]"
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReport:
    """What became of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    weights: tuple[float, ...]  # of the models, summing to 1 where the method normalizes; empty for a copied tensor
    moved: float | None  # share of the positions at which it is not the base's; None without a base


def merge(
    config: MergeConfig,
    *,
    base: Path | None,
    models: Mapping[str, Path],
    output: Path,
    identity: Mapping[str, Any],
    lineage: Mapping[str, Any],
    tokenizer_of: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Merge models into a new Hugging Face folder, which appears in one step. The order of the models does not matter.

    Args:
        config: the method and its settings.
        base: folder of the model that the others were trained from. Every method but linear needs it; the config of the merged model
            and the rows of its vocabulary that not all models have are the base's.
        models: their folders by name.
        output: the new folder; nothing may be there.
        identity: what `merge_identity` says of this merge; kept in the report, for `merged_before`.
        lineage: what the models were made from, for the model card.
        tokenizer_of: folder that the tokenizer's files are copied from; by default the base, without one the first model by name.
        on_progress: told the bytes that are written and those that there will be.

    Raises:
        UsageError: the settings do not fit the models that were named.
        DataError: the models do not fit each other, or hold what cannot be merged; nothing is left behind.
        FileExistsError: there is something at `output`.
    """
    raise NotImplementedError


def merge_identity(config: MergeConfig, *, base: str | None, models: Mapping[str, str]) -> dict[str, Any]:
    """What determines the merged weights, as JSON holds it.

    Args:
        config: the method and its settings.
        base: digest of the base's weights and config (`ModelFolder.weights_digest`).
        models: digests of the models, by name.
    """
    return {"stage": _STAGE, "settings": config.determines(list(models)), "base": base, "models": dict(sorted(models.items()))}


def merged_before(output: Path, *, identity: Mapping[str, Any]) -> bool:
    """Whether `output` is the whole result of the merge with this identity. A merge appears in one step, so its report says it all."""
    try:
        report = json.loads((output / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and report.get("identity") == json.loads(json.dumps(identity))
