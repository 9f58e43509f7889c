"""What a merge is asked to do. Light: does not import torch, so the command line can read it at once."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Method = Literal["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "varm", "sce"]

_WEIGHTED = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")
_DARE = ("dare_linear", "dare_ties")
# The methods that read a key; keys that are not here are for all of them.
_OF_METHODS: dict[str, tuple[str, ...]] = {
    "variant": ("sce",),
    "density": ("ties", *_DARE, "sce"),
    "densities": ("ties", *_DARE),
    "weights": _WEIGHTED,
    "normalize": _WEIGHTED,
    "scale": ("task_arithmetic", "ties", *_DARE),
    "t": ("slerp",),
    "seed": _DARE,
}
_NORMALIZED = {"linear", "ties"}  # by default, as in mergekit
_DENSITIES = {"sce": 0.1, "ties": 0.2, "dare_linear": 0.1, "dare_ties": 0.1}  # those of the papers' main results

Density = Annotated[float, Field(gt=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class MergeConfig(BaseModel):
    """How models of one architecture are merged into one, in parameter space.

    The default is FuseChat's (arXiv:2408.07990, section 3.3): `sce` with the highest 10 % of the variances, in the form of its code.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field("merged", min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the merged model")
    method: Method = Field("sce", description="how the tensors of the models become one; `docs/merging.md` has the formulas")
    variant: Literal["fuseai", "mergekit"] = Field(
        "fuseai",
        description="of sce: positions of low variance are left out of the models' weights only, as in the code of the published results; "
        "or they do not move at all, as in mergekit",
    )
    density: Density | None = Field(
        None, description="share of the positions of each tensor that are kept or selected; by default 0.1, and 0.2 for ties"
    )
    densities: dict[str, Density] = Field({}, description="density of some models, as `[merge.densities]`")
    weights: dict[str, Finite] = Field({}, description="weight of some models, as `[merge.weights]`; 1 for the others")
    normalize: bool | None = Field(None, description="divide by the sum of the weights; by default for linear and ties")
    scale: Finite = Field(1.0, description="multiplies the merged task vector (λ in the papers)")
    t: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="of slerp: 0 is the base, 1 the other model")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of what DARE drops")
    vocabulary: Literal["same", "common"] = Field(
        "same", description="vocabularies must have one size; or the rows that all models have are merged, and the others are the base's"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="number format that is written; by default the models'"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for key in sorted(self.model_fields_set & _OF_METHODS.keys()):
            if self.method not in _OF_METHODS[key]:
                methods = ", ".join(_OF_METHODS[key])
                raise ValueError(f"{key} is only for method = {methods} (method is {self.method!r}): remove it, or set method")
        return self

    @property
    def needs_base(self) -> bool:
        """Whether the method starts from a base."""
        return self.method != "linear"

    @property
    def least_models(self) -> int:
        """Models that the method needs, beside the base."""
        return 2 if self.method in {"varm", "sce"} else 1

    @property
    def most_models(self) -> int | None:
        """Models that the method can take, beside the base; None: any number."""
        return 1 if self.method == "slerp" else None

    @property
    def normalizes(self) -> bool:
        """`normalize`, or the method's default."""
        return self.method in _NORMALIZED if self.normalize is None else self.normalize

    def density_of(self, model: str) -> float:
        """Of one model: its own, else `density`, else the method's default."""
        return self.densities.get(model, self.density or _DENSITIES[self.method])

    def weight_of(self, model: str) -> float:
        """Of one model."""
        return self.weights.get(model, 1.0)

    def determines(self, models: list[str]) -> dict[str, Any]:
        """The settings that change what comes out, of a merge of these models: equal for equal merges, however they were said."""
        settings: dict[str, Any] = {"method": self.method, "vocabulary": self.vocabulary, "dtype": self.dtype}
        for key in ("variant", "scale", "t", "seed"):
            if self.method in _OF_METHODS[key]:
                settings[key] = getattr(self, key)
        if self.method in _WEIGHTED:
            settings |= {"weights": {model: self.weight_of(model) for model in sorted(models)}, "normalize": self.normalizes}
        if self.method in _OF_METHODS["densities"]:
            settings["densities"] = {model: self.density_of(model) for model in sorted(models)}
        elif self.method == "sce":
            settings["density"] = self.density_of("")
        return settings
