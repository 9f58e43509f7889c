"""Checks combinations of a recipe's sections that cannot work."""

from collections.abc import Iterator, Mapping

from ..store.toml_text import KeyPath
from ..train.merging.config import MergeConfig
from .problems import Problem
from .recipe import Recipe


def impossible(recipe: Recipe) -> Iterator[Problem]:
    """Combinations across sections that cannot work."""
    names: dict[str, str] = {}
    for path, name in [(("target", "name"), recipe.target.name), *((("sources", i, "name"), s.name) for i, s in enumerate(recipe.sources))]:
        if name in names:
            yield Problem(path, f"{name!r} is also {names[name]}: give each model a unique name")
        names[name] = ".".join(map(str, path))
    for index, source in enumerate(recipe.sources):
        if (source.model, source.revision) == (recipe.target.model, recipe.target.revision):
            yield Problem(("sources", index, "model"), "is the target's start, which is always a source: remove this entry")
    yield from _taken_names(recipe, names)
    if recipe.evaluation.clm_baseline and not recipe.training.uses_targets:
        yield Problem(("training", "clm_weight"), "1 is the value of the baseline: set evaluation.clm_baseline = false")
    if recipe.evaluation.all_at_once and recipe.merge is None:
        yield Problem(("evaluation", "all_at_once"), "needs [merge]; without it all sources are fused at once: remove it")
    if recipe.evaluation.ensembles and recipe.corpus.chat is not None:
        yield Problem(("evaluation", "ensembles"), "needs plain text, but the corpus has conversations: remove it")
    for key in ("ensembles", "ensemble_members"):
        values = getattr(recipe.evaluation, key)
        if len(set(values)) < len(values):
            yield Problem(("evaluation", key), "names something twice: remove one of them")
    for name in recipe.evaluation.ensemble_members:
        if name not in [model.name for model in recipe.models]:
            models = ", ".join(model.name for model in recipe.models)
            yield Problem(("evaluation", "ensemble_members"), f"{name!r} must be the name of one of the models: {models}")
    if recipe.evaluation.split == "train":
        yield Problem(("evaluation", "split"), "'train' is the training data of the models: choose another split")
    for path, model in [(("target",), recipe.target), *((("sources", i), source) for i, source in enumerate(recipe.sources))]:
        if model.chat_template == "own" and (recipe.corpus.chat is None or model is recipe.target):
            what = "is only for sources" if model is recipe.target else "needs [corpus.chat]"
            yield Problem((*path, "chat_template"), f"'own' {what}. Remove it")
    if recipe.training.domain_weights and recipe.corpus.domain_column is None:
        yield Problem(("training", "domain_weights"), "needs the domains of the documents: set corpus.domain_column")
    if recipe.merge is not None:
        yield from _impossible_merge(recipe.merge, sources=[source.name for source in recipe.sources])
        if not recipe.training.uses_targets:
            yield Problem(("training", "clm_weight"), "1 learns nothing from the sources: with [merge] their models would all be the same")
    yield from _impossible_fusion(recipe)


def _taken_names(recipe: Recipe, taken: dict[str, str]) -> Iterator[Problem]:
    """Names of made models that another model has. `taken` has the names of the sources and the target, and says whose they are."""
    made = sorted(((each.name, each.key) for each in recipe.trainings), key=lambda item: item[1] != ("training", "name"))
    if recipe.merged_name is not None:
        made.append((recipe.merged_name, ("merge", "name")))
    made += [(f"ensemble-{rule}", ("evaluation", "ensembles")) for rule in dict.fromkeys(recipe.evaluation.ensembles)]
    for name, key in made:
        if name in taken:
            yield Problem(key, f"{name!r} is also {taken[name]}: choose another")
        taken[name] = ".".join(key)


def _impossible_merge(merge: MergeConfig, *, sources: list[str]) -> Iterator[Problem]:
    if merge.most_models is not None and len(sources) > merge.most_models:
        what = f"{merge.method!r} merges {merge.most_models} model with the target's start, but there are {len(sources)}: choose another"
        yield Problem(("merge", "method"), what)
    if merge.vocabulary != "same":
        yield Problem(
            ("merge", "vocabulary"), "is for models with different vocabularies, but all models here have the target's: remove it"
        )
    for key in ("weights", "densities"):
        for name in getattr(merge, key).keys() - set(sources):
            yield Problem(("merge", key, name), f"{name!r} must be the name of a source: {', '.join(sources)}")


def _impossible_fusion(recipe: Recipe) -> Iterator[Problem]:
    fusion = recipe.fusion
    models = ", ".join(model.name for model in recipe.models)
    if fusion.pack_length is not None and fusion.unit != "pack":
        yield Problem(("fusion", "pack_length"), f"is only for unit = 'pack' (unit is {fusion.unit!r}): remove it, or set unit")
    if fusion.method != "fixed":
        for key in ("weights", "domain_weights"):
            if key in fusion.model_fields_set:
                yield Problem(("fusion", key), f"is only for method = 'fixed' (method is {fusion.method!r}): remove it, or set method")
        return
    tables: dict[KeyPath, Mapping[str, float]] = {("fusion", "weights"): fusion.weights}
    tables |= {("fusion", "domain_weights", domain): weights for domain, weights in fusion.domain_weights.items()}
    for path, weights in tables.items():
        unknown = weights.keys() - {model.name for model in recipe.models}
        for name in unknown:
            yield Problem((*path, name), f"{name!r} must be the name of a model: {models}")
        for fused in [] if unknown else recipe.fusions:
            names = [model.name for model in (recipe.target, *fused.sources)]
            if not any(weights.get(name) for name in names):
                yield Problem(path, f"method = 'fixed' needs a weight above 0 for at least one of the models: {', '.join(names)}")
                break
    if fusion.domain_weights and recipe.corpus.domain_column is None:
        yield Problem(("fusion", "domain_weights"), "needs the domains of the documents: set corpus.domain_column")
