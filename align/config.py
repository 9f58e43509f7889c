"""The `[alignment]` and `[fusion]` of a recipe."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class AlignmentConfig(BaseModel):
    """How a source's positions and tokens are brought to the target's."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    positions: Literal["span"] = Field("span", description="position map: `span` pairs positions whose prefixes end at the same byte")
    vocabulary: Literal["prefix", "exact"] = Field(
        "prefix", description="vocabulary map: `exact` pairs tokens of the same bytes; `prefix` falls back to the target's first piece"
    )
    gold_anchor: bool = Field(True, description="give the token that follows in the text exactly the source's probability of that text")


class FusionConfig(BaseModel):
    """How the sources' aligned distributions become one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field("fused", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the targets in the workspace")
    method: Literal["mince", "avgce"] = Field(
        "mince", description="`mince` takes the best source, `avgce` averages them by how good they are"
    )
    unit: Literal["segment"] = Field("segment", description="unit of text over which the sources are compared")
    metric: Literal["bpb", "ce"] = Field(
        "bpb", description="`bpb` (bits per byte) compares across tokenizers; `ce` (nats per token) is the papers'"
    )
    top_k: int | None = Field(None, ge=1, le=1024, description="entries of each fused distribution; by default as in [distributions]")
