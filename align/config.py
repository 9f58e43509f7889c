"""The `[alignment]` and `[fusion]` of a recipe."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class AlignmentConfig(BaseModel):
    """How a source's positions and tokens are brought to the target's."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    positions: Literal["cover", "span"] = Field(
        "cover",
        description="position map: `span` pairs positions whose prefixes end at the same byte; `cover` also has a source position speak of "
        "what lies inside the token that follows it, by those of its entries that agree with the text so far",
    )
    vocabulary: Literal["prefix", "exact"] = Field(
        "prefix", description="vocabulary map: `exact` pairs tokens of the same bytes; `prefix` falls back to the target's first piece"
    )
    gold_anchor: bool = Field(True, description="give the token that follows in the text exactly the source's probability of that text")

    @model_validator(mode="after")
    def _check_cover(self) -> Self:
        if self.positions == "cover" and self.vocabulary != "prefix":
            raise ValueError(
                f'positions ("cover") needs vocabulary = "prefix", which maps what is left of tokens, and it is "{self.vocabulary}". '
                'Use it, or positions = "span"'
            )
        if self.positions == "cover" and not self.gold_anchor:
            raise ValueError('positions ("cover") has the gold anchor built in: set gold_anchor = true, or positions = "span"')
        return self


Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class FusionConfig(BaseModel):
    """How the sources' aligned distributions become one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field("fused", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the targets in the workspace")
    method: Literal["mince", "avgce", "entropy", "confidence", "fixed"] = Field(
        "mince",
        description="`mince` takes the source that predicts the text best; the others are means: `avgce` weighs by how well each predicts "
        "the text, `entropy` and `confidence` by how sure each is, `fixed` as `weights` says",
    )
    unit: Literal["token", "segment", "document", "pack"] = Field(
        "segment", description="unit of text over which the sources are compared; `pack`: consecutive segments of `pack_length` tokens"
    )
    metric: Literal["bpb", "ce"] = Field(
        "bpb",
        description="`bpb` (bits per byte) compares across tokenizers; `ce` (nats per token) is the papers'; of one token the two are one",
    )
    pack_length: int | None = Field(
        None, ge=2, description="with unit `pack`: target tokens in a pack, at most; by default corpus.context_length"
    )
    weights: dict[str, Weight] = Field(
        {}, description="with method `fixed`: weight by name of the model, the target's own start included; 0 where left out"
    )
    domain_weights: dict[str, dict[str, Weight]] = Field(
        {}, description="with method `fixed`: other weights for documents of some domains, as `[fusion.domain_weights.<domain>]`"
    )
    fallback: Literal["target", "one_hot", "one_hot_published"] = Field(
        "target",
        description="where no chosen source has a distribution: the `target`'s own start, or all mass on the token that follows; published "
        "code of FuseLLM puts it on the token itself",
    )
    top_k: int | None = Field(None, ge=1, le=1024, description="entries of each fused distribution; by default as in [distributions]")
