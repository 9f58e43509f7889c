"""The recipe: what to fuse into what. Each section is the config of the stage that owns it; this module only puts them together."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from ..align.config import AlignmentConfig, FusionConfig
from ..ingest.corpus import CorpusConfig
from ..ingest.distributions import DistributionsConfig
from ..ingest.model_config import ModelConfig
from ..train.config import TrainingConfig
from ..train.merging.config import MergeConfig
from .executors.config import ExecutorConfig
from .problems import section_of

BASE = "base"  # names the recipe itself among its variants


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
    ensembles: list[Literal["uniform", "bayes", "oracle_document", "oracle_token"]] = Field(
        [],
        description="baselines without training: the models' outputs, mixed on the held-out text with equal weights (`uniform`) or by what "
        "each has predicted of the document so far (`bayes`); and the bounds of choosing one model per document or per token, by the text",
    )
    ensemble_members: list[str] = Field([], description="names of the models that are mixed; by default all sources and the target's start")


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


class Variant(BaseModel):
    """One of the `[[variants]]` of a recipe: a name, and the keys that differ from the recipe's."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    name: str = Field(
        pattern=r"^[A-Za-z0-9]+([._-][A-Za-z0-9]+)*$", description="name of the variant; what only it needs has it in its own name"
    )

    @property
    def changes(self) -> dict[str, Any]:
        """The keys that differ, as in the file."""
        return dict(self.model_extra or {})


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
    variants: list[Variant] = Field([], description="the same with some keys changed; what is the same is made once")

    _data: dict[str, Any] = PrivateAttr({})

    @model_validator(mode="wrap")
    @classmethod
    def _keep_data(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        recipe = handler(data)
        recipe._data = copy.deepcopy(data) if isinstance(data, dict) else {}
        return recipe

    def with_variant(self, variant: Variant) -> "Recipe":
        """The recipe with the keys of a variant. It has no variants, and the same executor.

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
        """Names of the models whose outputs are mixed."""
        return self.evaluation.ensemble_members or [model.name for model in self.models]

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


def changed_data(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The data of a recipe's file with the keys of a variant.

    A section's keys are changed one by one; a list, or a table of names and values, is replaced. `sources` may list names of the recipe's.
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
