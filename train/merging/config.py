"""The settings of a merge. Does not import torch, so the command line loads fast."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Method = Literal["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "varm", "sce"]

_WEIGHTED = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")
_DARE = ("dare_linear", "dare_ties")
# The methods that use a key; other keys are for all methods.
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
    """How models of one architecture are merged in parameter space.

    The default is FuseChat's (arXiv:2408.07990, section 3.3): `sce` with the highest 10 % of the variances, as in its code.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field("merged", min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the merged model")
    method: Method = Field("sce", description="how the models' tensors are merged; `docs/merging.md` has the formulas")
    variant: Literal["fuseai", "mergekit"] = Field(
        "fuseai",
        description="for sce: positions of low variance are left out of the models' weights only, as in the code of the published results; "
        "or they do not change at all, as in mergekit",
    )
    density: Density | None = Field(
        None, description="share of the positions of each tensor to keep or select; by default 0.1, for ties 0.2"
    )
    densities: dict[str, Density] = Field({}, description="density for some models, as `[merge.densities]`")
    weights: dict[str, Finite] = Field({}, description="weight of some models, as `[merge.weights]`; 1 for other models")
    normalize: bool | None = Field(None, description="divide by the sum of the weights; by default for linear and ties")
    scale: Finite = Field(1.0, description="multiplies the merged task vector (λ in the papers)")
    t: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="for slerp: 0 is the base, 1 the other model")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of the positions that DARE drops")
    vocabulary: Literal["same", "common"] = Field(
        "same", description="`same`: vocabularies must have one size; `common`: rows that all models have are merged, others are the base's"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="number format of the merged model; by default that of the models"
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
        """Models that the method needs, besides the base."""
        return 2 if self.method in {"varm", "sce"} else 1

    @property
    def most_models(self) -> int | None:
        """Models that the method can take, besides the base; None: any number."""
        return 1 if self.method == "slerp" else None

    @property
    def normalizes(self) -> bool:
        """`normalize`, or the method's default."""
        return self.method in _NORMALIZED if self.normalize is None else self.normalize

    def density_of(self, model: str) -> float:
        """The density of one model: its own, else `density`, else the method's default."""
        return self.densities.get(model, self.density or _DENSITIES[self.method])

    def weight_of(self, model: str) -> float:
        """The weight of one model."""
        return self.weights.get(model, 1.0)

    def determines(self, models: list[str]) -> dict[str, Any]:
        """The settings that determine the result of a merge of these models; equivalent settings are equal."""
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
