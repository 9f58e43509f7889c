"""Baselines that need no training: the mixed outputs of several models on the held-out text."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...eval.ensemble import EnsembleStage, Rule, ensemble_identity
from ...store.fingerprint import Identity
from .cost import Cost, Sizes
from .forward import Evaluation
from .product import Drawing, OpenSite, PartsProduct, Product, Site

_CHUNK_BYTES = 4  # stored bytes per token of the text


@dataclass(frozen=True, eq=False, kw_only=True)
class Ensemble(PartsProduct):
    """`ensembles/<rule>--<split>`: the members' likelihoods, mixed by a rule."""

    kind: ClassVar[str] = "ensembles"
    command: ClassVar[str] = "eval"
    noun: ClassVar[str] = "ensemble"
    is_last: ClassVar[bool] = True

    rule: Rule
    members: tuple[Evaluation, ...]

    @classmethod
    def of(cls, drawing: Drawing) -> Iterator["Ensemble"]:
        recipe = drawing.recipe
        members = tuple(drawing.get(Evaluation, name) for name in recipe.ensemble_members)
        for rule in recipe.evaluation.ensembles:
            yield cls(recipe=recipe, rule=rule, members=members)

    @property
    def role(self) -> str:
        return self.rule

    @property
    def model_name(self) -> str:
        """Its name in SQL and reports."""
        return self.suffixed(f"ensemble-{self.rule}")

    @property
    def name(self) -> str:
        return f"{self.suffixed(self.rule)}--{self.split}"

    @property
    def title(self) -> str:
        return f"{self.noun} {self.suffixed(self.rule)}"

    @property
    def inputs(self) -> tuple[Product, ...]:
        return self.members

    @property
    def choices(self) -> Mapping[str, Any]:
        return {"rule": self.rule}

    @property
    def split(self) -> str:
        return self.recipe.evaluation.split

    def identity(self, site: Site) -> Identity:
        return ensemble_identity([site.dataset(member) for member in self.members], rule=self.rule)

    def description(self, site: OpenSite) -> dict[str, Any]:
        members = [member.model_name for member in self.members]
        return super().description(site) | {"model": self.model_name, "split": self.split, "members": members}

    def stage(self, site: OpenSite) -> EnsembleStage:
        return EnsembleStage(
            site.dataset(self),
            members=[site.dataset(member) for member in self.members],
            tokenizer_folders=[site.tokenizer_folder(site.model(member)) for member in self.members],
            rule=self.rule,
        )

    def cost(self, sizes: Sizes) -> Cost:
        tokens = sizes.tokens(self, self.split)
        return Cost(stored_bytes=_CHUNK_BYTES * tokens, tokens=tokens)
