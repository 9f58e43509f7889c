"""The recipe: a TOML file that says what to fuse into what. Read, checked as a whole, and reported on by line.

Each section is the config of the stage that owns it; this module only puts them together.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .align.config import AlignmentConfig, FusionConfig
from .cluster.config import ExecutorConfig, WrongKeys
from .ingest.corpus import CorpusConfig
from .ingest.distributions import DistributionsConfig
from .ingest.models import ModelConfig
from .store.errors import UsageError
from .store.shown import shown
from .store.toml_text import KeyPath, Lines, holds, parse_toml
from .store.user_text import read_user_text
from .train.config import TrainingConfig
from .train.merging.config import MergeConfig


class EvaluationConfig(BaseModel):
    """The `[evaluation]` of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    split: str = Field("test", description="split of the corpus that the models are compared on")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="number format of the forward passes; bfloat16 rounds small changes of the weights away"
    )
    clm_baseline: bool = Field(True, description="also train with clm_weight = 1, all else equal, and compare with it")
    clm_name: str = Field("clm", pattern=r"^[A-Za-z0-9]+([._-][A-Za-z0-9]+)*$", description="name of that baseline's run and export")
    all_at_once: bool = Field(
        False, description="with [merge]: also fuse all sources at once, train on that, all else equal, and compare with the merged model"
    )


@dataclass(frozen=True, slots=True)
class Fusion:
    """Sources that are fused with the target's start, and the name of the targets that come of it."""

    name: str
    sources: tuple[ModelConfig, ...]


@dataclass(frozen=True, slots=True)
class Training:
    """A training, and the fusion whose targets it learns from; a baseline that learns from text alone has the tokens from there."""

    config: TrainingConfig
    fusion: Fusion
    key: tuple[str, str]  # section and key of the recipe that the name is from

    @property
    def name(self) -> str:
        """Of its run and its export."""
        return self.config.name


class Recipe(BaseModel):
    """What to fuse into what, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    corpus: CorpusConfig
    target: ModelConfig
    sources: list[ModelConfig] = Field(min_length=1, description="the models to learn from; the target's own start is always one more")
    distributions: DistributionsConfig = DistributionsConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    fusion: FusionConfig = FusionConfig()
    training: TrainingConfig = TrainingConfig()
    merge: MergeConfig | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    executor: ExecutorConfig = ExecutorConfig()

    @property
    def models(self) -> list[ModelConfig]:
        """The target's start first, then the sources."""
        return [self.target, *self.sources]

    @property
    def top_k(self) -> int:
        """Entries of each fused distribution."""
        return self.fusion.top_k or self.distributions.top_k

    @property
    def pack_length(self) -> int:
        """Target tokens in a pack, where the sources are compared pack by pack."""
        return self.fusion.pack_length or self.corpus.context_length

    @property
    def _selections(self) -> list[tuple[str, tuple[ModelConfig, ...]]]:
        """Which sources are fused together, each with what the names of its targets and its training end in.

        With `[merge]` each source is fused with the target's start alone. What is made of all of them has their number in its name, so that
        a source that is added later takes no name.
        """
        everything = tuple(self.sources)
        if self.merge is None:
            return [("", everything)]
        at_once = [(f"-all-{len(everything)}", everything)] if self.evaluation.all_at_once else []
        return [(f"--{source.name}", (source,)) for source in self.sources] + at_once

    @property
    def fusions(self) -> list[Fusion]:
        """What is fused: all sources at once, or with `[merge]` each by itself."""
        return [Fusion(f"{self.fusion.name}{ending}", sources) for ending, sources in self._selections]

    @property
    def trainings(self) -> list[Training]:
        """The baseline where one is wanted, and a training for each fusion."""
        names = [f"{self.training.name}{ending}" for ending, _ in self._selections]
        fused = [
            Training(self.training.model_copy(update={"name": name}), fusion, ("training", "name"))
            for name, fusion in zip(names, self.fusions, strict=True)
        ]
        if not self.evaluation.clm_baseline:
            return fused
        changes = {"name": self.evaluation.clm_name, "clm_weight": 1.0, "clm_weight_end": None}
        return [Training(self.training.model_copy(update=changes), self.fusions[0], ("evaluation", "clm_name")), *fused]

    @property
    def merged_name(self) -> str | None:
        """Name of the merged model, where there is `[merge]`, and something to merge: of one source's model most methods make nothing."""
        n = len(self.sources)
        return None if self.merge is None or n < self.merge.least_models else f"{self.merge.name}-{n}"

    @property
    def merged_trainings(self) -> dict[str, Training]:
        """The trainings whose models are merged, by name of the source that each learns from."""
        if self.merge is None:
            return {}
        learned = {training.fusion.name: training for training in self.trainings if training.key == ("training", "name")}
        return {source.name: learned[f"{self.fusion.name}--{source.name}"] for source in self.sources}

    @property
    def made_models(self) -> list[str]:
        """Names of the models that the recipe makes, in the order in which it makes them."""
        return [training.name for training in self.trainings] + [name for name in [self.merged_name] if name is not None]


_COMPARED = ("name", "path", "model", "revision")  # the keys that other sections are compared with, and those without which there is none
MOST_PROBLEMS = 10  # that a message lists
_LONGEST_KEY = 80  # characters of a key that a message names


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a recipe."""

    path: KeyPath
    text: str
    is_unknown: bool = False  # the key, or the section, is none of a recipe's


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        UsageError: it cannot be read, or something in it is wrong; the text lists everything at once, with lines and what would be valid.
    """
    return parse_recipe(read_user_text(path, what=f"The recipe {path}"), path=path)


def parse_recipe(text: str, *, path: Path) -> Recipe:
    """Check the text of a recipe; `path` is for the messages.

    Raises:
        UsageError: as of `load_recipe`.
    """
    recipe, problems = _validated(parse_toml(text, what=f"The recipe {path}"))
    if problems or recipe is None:
        raise UsageError(said_of_problems([(each.path, each.text) for each in problems], text=text, what=f"The recipe {path}"))
    return recipe


def said_of_problems(problems: Sequence[tuple[KeyPath, str]], *, text: str, what: str) -> str:
    """What is wrong in a file, with lines; of many problems the first `MOST_PROBLEMS`.

    Args:
        problems: the key, and what is wrong with it.
        text: of the file, which is valid TOML.
        what: names it, as in "The recipe x.toml".
    """
    lines = Lines(text)
    placed = sorted((lines.of(path), ".".join(map(_short_key, path)) or "recipe", said) for path, said in problems[:MOST_PROBLEMS])
    listed = "\n".join(f"  line {line}: {where}: {said}" for line, where, said in placed)
    more = f"\n  and {len(problems) - MOST_PROBLEMS:,} more" if len(problems) > MOST_PROBLEMS else ""
    return f"{what} has {len(problems):,} problem{'s' * (len(problems) > 1)}:\n{listed}{more}"


def _short_key(key: str | int) -> str:
    text = str(key)
    return text if len(text) <= _LONGEST_KEY else f"{text[:_LONGEST_KEY]}..."


def _validated(data: dict[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    """The recipe, if it can be made at all, and everything wrong with it.

    What is wrong is noted, dropped, and the rest checked again, so that combinations are checked even where some other key is wrong.
    """
    problems: list[Problem] = []
    while True:
        try:
            recipe = Recipe.model_validate(data)
        except ValidationError as error:
            found = [problem for details in error.errors() for problem in _problems(dict(details))]
            noted = {problem.path for problem in problems}  # what was dropped is not missing
            problems += [problem for problem in found if problem.path not in noted]
            dropped = [_drop(data, problem) for problem in found]
            if not any(dropped):
                return None, problems
        else:
            return recipe, problems + list(_impossible(recipe))


def _problems(details: dict[str, Any]) -> list[Problem]:
    error = details.get("ctx", {}).get("error")
    if isinstance(error, WrongKeys):
        return [Problem((*details["loc"], key), text) for key, text in error.problems.items()]
    return [_problem(details)]


def _problem(details: dict[str, Any]) -> Problem:
    path = tuple(details["loc"])
    match details["type"]:
        case "extra_forbidden":
            valid = list(_fields_at(path[:-1]))
            close = difflib.get_close_matches(_short_key(path[-1]), valid, n=1)
            hint = f"Did you mean {close[0]}? " if close else ""
            return Problem(path, f"unknown key. {hint}Valid are: {', '.join(valid)}", is_unknown=True)
        case "missing":
            return Problem(path, f"is missing: {_fields_at(path[:-1])[str(path[-1])].description or 'a section'}")
        case "value_error":
            return Problem(path, str(details["ctx"]["error"]))
        case _:
            message = details["msg"].removeprefix("Input ")
            return Problem(path, f"{shown(details['input'])} {message if message.startswith('should') else 'is wrong: ' + message}")


def _fields_at(path: KeyPath) -> Mapping[str, Any]:
    """The fields of the section at a path, by name."""
    model: Any = Recipe
    for key in path:
        if isinstance(key, str):
            annotation = model.model_fields[key].annotation
            choices = (annotation, *get_args(annotation))  # a section, a list of them, or one that may be left out
            model = next(choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel))
    return model.model_fields


def _drop(data: dict[str, Any], problem: Problem) -> bool:
    """Take what is wrong out of the data. Of a section whose keys do not go together, those stay that other sections are compared with."""
    node: Any = data
    for key in problem.path[:-1]:
        if not holds(node, (key,)):
            return False
        node = node[key]
    if not problem.path or not isinstance(node, dict) or problem.path[-1] not in node:
        return False
    section = node.pop(problem.path[-1])
    if problem.is_unknown or not isinstance(section, dict):
        return True
    node[problem.path[-1]] = {key: section[key] for key in _COMPARED if key in section}
    return node[problem.path[-1]] != section


def _impossible(recipe: Recipe) -> Iterator[Problem]:
    """Combinations across sections that cannot work."""
    names: dict[str, str] = {}
    for path, name in [(("target", "name"), recipe.target.name), *((("sources", i, "name"), s.name) for i, s in enumerate(recipe.sources))]:
        if name in names:
            yield Problem(path, f"{name!r} is also {names[name]}: each model needs a name of its own")
        names[name] = ".".join(map(str, path))
    for index, source in enumerate(recipe.sources):
        if (source.model, source.revision) == (recipe.target.model, recipe.target.revision):
            yield Problem(("sources", index, "model"), "is the target's start, which always is a source: remove this entry")
    yield from _taken_names(recipe, names)
    if recipe.evaluation.clm_baseline and not recipe.training.uses_targets:
        yield Problem(("training", "clm_weight"), "1 is what the baseline trains with: set evaluation.clm_baseline = false")
    if recipe.evaluation.all_at_once and recipe.merge is None:
        yield Problem(("evaluation", "all_at_once"), "is for recipes with [merge]; without it all sources are fused at once: remove it")
    if recipe.evaluation.split == "train":
        yield Problem(("evaluation", "split"), "'train' is what the models are trained on: choose another split")
    for path, model in [(("target",), recipe.target), *((("sources", i), source) for i, source in enumerate(recipe.sources))]:
        if model.chat_template == "own" and (recipe.corpus.chat is None or model is recipe.target):
            what = "is for sources: the target reads what it is trained on" if model is recipe.target else "needs [corpus.chat]"
            yield Problem((*path, "chat_template"), f"'own' {what}. Remove it")
    if recipe.training.domain_weights and recipe.corpus.domain_column is None:
        yield Problem(("training", "domain_weights"), "needs to know the documents' domains: say corpus.domain_column")
    if recipe.merge is not None:
        yield from _impossible_merge(recipe.merge, sources=[source.name for source in recipe.sources])
        if not recipe.training.uses_targets:
            yield Problem(("training", "clm_weight"), "1 learns nothing of the sources: with [merge] their models would all be the same")
    yield from _impossible_fusion(recipe)


def _taken_names(recipe: Recipe, taken: dict[str, str]) -> Iterator[Problem]:
    """Names of models that are made and that some other model has; `taken` are those of the sources and the target, and whose they are."""
    made = sorted(((each.name, each.key) for each in recipe.trainings), key=lambda item: item[1] != ("training", "name"))
    if recipe.merged_name is not None:
        made.append((recipe.merged_name, ("merge", "name")))
    for name, key in made:
        if name in taken:
            yield Problem(key, f"{name!r} is also {taken[name]}: choose another")
        taken[name] = ".".join(key)


def _impossible_merge(merge: MergeConfig, *, sources: list[str]) -> Iterator[Problem]:
    if merge.most_models is not None and len(sources) > merge.most_models:
        what = f"{merge.method!r} merges {merge.most_models} model with the target's start, and there are {len(sources)}: choose another"
        yield Problem(("merge", "method"), what)
    if merge.vocabulary != "same":
        yield Problem(("merge", "vocabulary"), "is for models of different vocabularies, and these all have the target's: remove it")
    for key in ("weights", "densities"):
        for name in getattr(merge, key).keys() - set(sources):
            yield Problem(("merge", key, name), f"{name!r} is none of the sources: {', '.join(sources)}")


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
            yield Problem((*path, name), f"{name!r} is none of the models: {models}")
        for fused in [] if unknown else recipe.fusions:
            names = [model.name for model in (recipe.target, *fused.sources)]
            if not any(weights.get(name) for name in names):
                yield Problem(path, f"method = 'fixed' needs a weight above 0 here, for at least one of the models: {', '.join(names)}")
                break
    if fusion.domain_weights and recipe.corpus.domain_column is None:
        yield Problem(("fusion", "domain_weights"), "needs to know the documents' domains: say corpus.domain_column")
