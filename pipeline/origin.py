"""What a model that was made here comes from, for its card."""

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
    """The corpus, the models with the digests of their weights, and how they were aligned and fused.

    Args:
        fusion: name of the targets that the model learned from; None of one that learned from text alone.
        sources: that are fused in them.
        recipe: that names it.
        models: the target's start and the sources, by name.
        corpus: of the texts.
        targets: fingerprint of the fused targets.
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
    """The same of a merged model: `trainings` are the lineages of the models that are merged, and `merged` these models, by one name."""
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
