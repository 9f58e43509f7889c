"""The origin of a model that fuseline made, for its model card."""

from collections.abc import Mapping, Sequence
from typing import Any

from .. import __version__
from ..ingest.model_config import ModelConfig
from ..ingest.models import ModelFolder
from ..store.dataset import Dataset
from .recipe import Recipe


def lineage(
    fusion: str | None,
    *,
    sources: Sequence[ModelConfig],
    recipe: Recipe,
    models: Mapping[str, ModelFolder],
    corpus: Dataset,
    targets: str,
) -> dict[str, Any]:
    """The corpus, the models with digests of their weights, and how they were aligned and fused.

    Args:
        fusion: name of the targets that the model learned from; None if it learned from text alone.
        sources: the sources in these targets.
        recipe: the recipe that names the model.
        models: the target's start and the sources, by name.
        corpus: the dataset of the texts.
        targets: fingerprint of the targets.
    """
    origin = _origin(recipe, models=models, corpus=corpus)
    if fusion is None:
        return origin
    return origin | {
        "sources": {source.name: models[source.name].origin for source in sources},
        "alignment": recipe.alignment.model_dump(),
        "fusion": recipe.fusion.model_dump() | {"name": fusion},
        "targets": targets,
    }


def merged_lineage(
    trainings: Mapping[str, Mapping[str, Any]],
    *,
    recipe: Recipe,
    models: Mapping[str, ModelFolder],
    corpus: Dataset,
    merged: Mapping[str, ModelFolder],
) -> dict[str, Any]:
    """The same for a merged model. `trainings` has the lineages of the merged models, and `merged` the models, by the same names."""
    return _origin(recipe, models=models, corpus=corpus) | {
        "models": {
            name: {"training": merged[name].config.name, "weights": merged[name].weights_digest} | dict(comes_from)
            for name, comes_from in trainings.items()
        }
    }


def _origin(recipe: Recipe, *, models: Mapping[str, ModelFolder], corpus: Dataset) -> dict[str, Any]:
    return {
        "fuseline": __version__,
        "corpus": {"name": recipe.corpus.name, "path": recipe.corpus.path, "fingerprint": corpus.fingerprint},
        "start": models[recipe.target.name].origin,
    }
