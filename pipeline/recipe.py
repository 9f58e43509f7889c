"""The recipe: what to fuse into what. Each section is the config of its stage; this module combines them."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from ..align.config import AlignmentConfig, FusionConfig
from ..eval.ensemble import Rule
from ..ingest.corpus import CorpusConfig
from ..ingest.distributions import DistributionsConfig
from ..ingest.model_config import ModelConfig
from ..train.config import TrainingConfig
from ..train.merging.config import MergeConfig
from .executors.config import ExecutorConfig
from .problems import section_of

BASE = "base"  # name of the recipe itself among its variants


class EvaluationConfig(BaseModel):
    """The `[evaluation]` of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    split: str = Field("test", description="split of the corpus that the models are compared on")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="number format of the forward passes; bfloat16 loses small changes of the weights"
    )
    clm_baseline: bool = Field(True, description="also train with clm_weight = 1 and otherwise equal settings, and compare with it")
    clm_name: str = Field("clm", pattern=r"^[A-Za-z0-9]+([._-][A-Za-z0-9]+)*$", description="name of the baseline's run and export")
    all_at_once: bool = Field(
        False, description="with [merge]: also fuse all sources at once, train on the result, and compare with the merged model"
    )
    ensembles: list[Rule] = Field(
        [],
        description="baselines without training: the models' outputs on the held-out text, mixed with equal weights (`uniform`) or by how "
        "well each predicted the document so far (`bayes`); and the bounds for the best model per document or token, chosen by the text",
    )
    ensemble_members: list[str] = Field([], description="names of the models to mix; by default all sources and the target's start")


@dataclass(frozen=True, slots=True)
class Fusion:
    """Sources that are fused with the target's start, and the name of the resulting targets."""

    name: str
    sources: tuple[ModelConfig, ...]


@dataclass(frozen=True, slots=True)
class Training:
    """A training, and the fusion whose targets it learns from. A baseline on text alone takes the tokens from this fusion."""

    config: TrainingConfig
    fusion: Fusion
    key: tuple[str, str]  # section and key of the recipe with the name

    @property
    def name(self) -> str:
        """Name of its run and its export."""
        return self.config.name


class Variant(BaseModel):
    """One of the `[[variants]]` of a recipe: a name, and the keys that it changes."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    name: str = Field(
        pattern=r"^[A-Za-z0-9]+([._-][A-Za-z0-9]+)*$",
        description="name of the variant; products that only this variant needs have it in their names",
    )

    @property
    def changes(self) -> dict[str, Any]:
        """The changed keys, as in the file."""
        return dict(self.model_extra or {})


class Recipe(BaseModel):
    """What to fuse into what, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    corpus: CorpusConfig
    target: ModelConfig
    sources: list[ModelConfig] = Field(
        min_length=1, description="the models to learn from; the target's own start is always an additional source"
    )
    distributions: DistributionsConfig = DistributionsConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    fusion: FusionConfig = FusionConfig()
    training: TrainingConfig = TrainingConfig()
    merge: MergeConfig | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    executor: ExecutorConfig = ExecutorConfig()
    variants: list[Variant] = Field([], description="the same recipe with some keys changed; equal products are made once")

    _data: dict[str, Any] = PrivateAttr({})

    @model_validator(mode="wrap")
    @classmethod
    def _keep_data(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        recipe = handler(data)
        recipe._data = copy.deepcopy(data) if isinstance(data, dict) else {}
        return recipe

    def with_variant(self, variant: Variant) -> "Recipe":
        """The recipe with the keys of a variant. The result has no variants, and the same executor.

        Raises:
            ValidationError: the keys are wrong.
        """
        recipe = Recipe.model_validate(changed_data(self._data, variant.changes))
        return recipe.model_copy(update={"executor": self.executor})

    @property
    def models(self) -> list[ModelConfig]:
        """The target's start first, then the sources."""
        return [self.target, *self.sources]

    @property
    def ensemble_members(self) -> list[str]:
        """Names of the models whose outputs the ensembles mix."""
        return self.evaluation.ensemble_members or [model.name for model in self.models]

    @property
    def top_k(self) -> int:
        """Number of entries of each fused distribution."""
        return self.fusion.top_k or self.distributions.top_k

    @property
    def pack_length(self) -> int:
        """Target tokens in a pack, if the sources are compared pack by pack."""
        return self.fusion.pack_length or self.corpus.context_length

    @property
    def _selections(self) -> list[tuple[str, tuple[ModelConfig, ...]]]:
        """The groups of sources that are fused together, each with the suffix of the names of its targets and its training.

        With `[merge]` each source is fused alone with the target's start. Products of all sources have their number in the name, so
        that they get new names when a source is added.
        """
        everything = tuple(self.sources)
        if self.merge is None:
            return [("", everything)]
        at_once = [(f"-all-{len(everything)}", everything)] if self.evaluation.all_at_once and len(everything) > 1 else []
        return [(f"--{source.name}", (source,)) for source in self.sources] + at_once

    @property
    def fusions(self) -> list[Fusion]:
        """The fusions: all sources at once, or with `[merge]` each source alone."""
        return [Fusion(f"{self.fusion.name}{ending}", sources) for ending, sources in self._selections]

    @property
    def trainings(self) -> list[Training]:
        """The baseline, if the recipe asks for it, and a training for each fusion."""
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
        """Name of the merged model. None without `[merge]`, or if the method needs more models."""
        n = len(self.sources)
        return None if self.merge is None or n < self.merge.least_models else f"{self.merge.name}-{n}"

    @property
    def merged_trainings(self) -> dict[str, Training]:
        """The trainings whose models are merged, by the name of the source of each."""
        if self.merge is None:
            return {}
        learned = {training.fusion.name: training for training in self.trainings if training.key == ("training", "name")}
        return {source.name: learned[f"{self.fusion.name}--{source.name}"] for source in self.sources}

    @property
    def made_models(self) -> list[str]:
        """Names of the models that the recipe makes, in order."""
        return [training.name for training in self.trainings] + [name for name in [self.merged_name] if name is not None]


def changed_data(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The data of a recipe file with the keys of a variant.

    A section's keys are changed one by one. A list, or a table of names and values, is replaced. `sources` may list source names.
    """
    found = _changed({key: value for key, value in data.items() if key != "variants"}, changes, section=Recipe)
    named = changes.get("sources")
    if isinstance(named, list) and all(isinstance(name, str) for name in named):
        by_name = {source.get("name"): source for source in data.get("sources", []) if isinstance(source, dict)}
        found["sources"] = [by_name.get(name, name) for name in named]
    return found


def _changed(data: Mapping[str, Any], changes: Mapping[str, Any], *, section: type[BaseModel]) -> dict[str, Any]:
    found = copy.deepcopy(dict(data))
    for key, value in changes.items():
        inner = section_of(section, key)
        if inner is not None and isinstance(value, dict) and isinstance(found.get(key, {}), dict):
            found[key] = _changed(found.get(key, {}), value, section=inner)
        else:
            found[key] = copy.deepcopy(value)
    return found
