"""What a trained model comes from, for its card."""

from collections.abc import Mapping
from typing import Any

from .. import __version__
from ..ingest.models import ModelFolder
from ..recipe import Recipe
from ..store.dataset import Dataset


def lineage(recipe: Recipe, *, models: Mapping[str, ModelFolder], corpus: Dataset, targets_fingerprint: str) -> dict[str, Any]:
    """The corpus, the models with the digests of their weights, and how they were aligned and fused."""
    start = models[recipe.target.name]
    return {
        "fuseline": __version__,
        "corpus": {"name": recipe.corpus.name, "path": recipe.corpus.path, "fingerprint": corpus.fingerprint},
        "start": {"model": start.config.model, "weights": start.weights_digest},
        "sources": {source.name: {"model": source.model, "weights": models[source.name].weights_digest} for source in recipe.sources},
        "alignment": recipe.alignment.model_dump(),
        "fusion": recipe.fusion.model_dump(),
        "targets": targets_fingerprint,
    }
