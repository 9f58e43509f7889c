"""The identity of a merge, and where a merged folder stores it. Does not import torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import MergeConfig

REPORT = "merge_report.json"
_STAGE = "merge/1"


def merge_identity(config: MergeConfig, *, base: str | None, models: Mapping[str, str]) -> dict[str, Any]:
    """What determines the merged weights, as JSON values.

    Args:
        config: the method and its settings.
        base: digest of the base's weights and config (`ModelFolder.weights_digest`).
        models: digests of the models, by name.
    """
    return {"stage": _STAGE, "settings": config.determines(list(models)), "base": base, "models": dict(sorted(models.items()))}


def merged_before(output: Path, *, identity: Mapping[str, Any]) -> bool:
    """Whether `output` is the result of the merge with this identity. A merge appears atomically, so its report is enough."""
    try:
        report = json.loads((output / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and report.get("identity") == json.loads(json.dumps(identity))
