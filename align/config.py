"""The `[alignment]` and `[fusion]` of a recipe."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class AlignmentConfig(BaseModel):
    """How a source's positions and tokens are mapped to the target's."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    positions: Literal["cover", "span", "dtw"] = Field(
        "cover",
        description="position map: `span` pairs positions whose prefixes end at the same byte; `cover` also uses a source position for "
        "target positions inside the token after it, by those of its entries that agree with the text so far; `dtw` warps the token "
        "strings by their edit distances (FuseLLM)",
    )
    dtw_match: Literal["em", "mined", "fusechat"] = Field(
        "mined",
        description="with positions `dtw`, which matched tokens count: one source token with the same spelling (`em`); also one that the "
        "vocabulary map maps to the target token (`mined`); also the last of a group with the same end (`fusechat`)",
    )
    vocabulary: Literal["prefix", "exact", "mined", "stat", "mined_published"] = Field(
        "prefix",
        description="vocabulary map: `exact` pairs tokens with the same bytes; others fall back to the target's first piece (`prefix`), "
        "the token at the smallest edit distance (`mined`), or the one most often matched in the corpus (`stat`); `mined_published` "
        "is the map of FuseLLM's code, over raw spellings",
    )
    collisions: Literal["sum", "first"] = Field(
        "sum", description="several source tokens on one target token: their `sum`, or only the most probable, `first` one (FuseLLM's code)"
    )
    gold_anchor: bool = Field(
        True,
        description="give the next token of the text exactly the source's probability of that text; false with positions `dtw`, "
        "which pairs prefixes that do not end at the same byte",
    )

    @model_validator(mode="before")
    @classmethod
    def _no_anchor_with_dtw(cls, data: Any) -> Any:
        return {"gold_anchor": False, **data} if isinstance(data, dict) and data.get("positions") == "dtw" else data

    @model_validator(mode="after")
    def _check_cover(self) -> Self:
        if self.positions == "cover" and self.vocabulary != "prefix":
            raise ValueError(
                f'positions ("cover") needs vocabulary = "prefix", which maps the rests of tokens, but it is "{self.vocabulary}". '
                'Set vocabulary = "prefix", or positions = "span" or "dtw"'
            )
        if self.positions == "cover" and not self.gold_anchor:
            raise ValueError('positions ("cover") always has the gold anchor: set gold_anchor = true, or positions = "span"')
        if self.positions == "cover" and self.collisions != "sum":
            raise ValueError(
                f'positions ("cover") sums the mass of several source tokens, but collisions is "{self.collisions}". '
                'Set collisions = "sum", or positions = "span" or "dtw"'
            )
        return self

    @model_validator(mode="after")
    def _check_dtw(self) -> Self:
        if self.positions == "dtw" and self.gold_anchor:
            raise ValueError(
                'gold_anchor (true) needs positions whose prefixes end at the same byte, but positions ("dtw") pairs others too. '
                'Set gold_anchor = false, or positions = "span" or "cover"'
            )
        if self.positions != "dtw" and "dtw_match" in self.model_fields_set:
            raise ValueError(
                f'dtw_match ("{self.dtw_match}") is only for positions = "dtw", but positions is "{self.positions}". Remove dtw_match'
            )
        return self

    @property
    def reads_map(self) -> bool:
        """Whether the position map depends on the vocabulary map."""
        return self.positions == "dtw" and self.dtw_match != "em"

    def matches_name(self, pair: str) -> str:
        """Name of the token matches of a pair, `<source>--<target>`."""
        return f"{pair}--{self.positions}"

    def map_name(self, pair: str) -> str:
        """Name of the vocabulary map of a pair. Each kind has its own name, so that several can be compared."""
        return f"{pair}--{self.vocabulary}" + (f"-{self.positions}" if self.vocabulary == "stat" else "")

    def alignment_name(self, pair: str) -> str:
        """Name of the alignment of a pair. Each kind has its own name; that of `cover` is the pair's."""
        if self.positions == "cover":
            return pair
        kind = f"dtw-{self.dtw_match}" if self.positions == "dtw" else self.positions
        return f"{pair}--{kind}" + (f"-{self.vocabulary}" if self.reads_map else "")


Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class FusionConfig(BaseModel):
    """How the sources' aligned distributions are combined."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field("fused", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the targets in the workspace")
    method: Literal["mince", "avgce", "entropy", "confidence", "fixed"] = Field(
        "mince",
        description="`mince` takes the source that predicts the text best; the other methods are means: `avgce` weighs by how well each "
        "source predicts the text, `entropy` and `confidence` by how certain it is, `fixed` by `weights`",
    )
    unit: Literal["token", "segment", "document", "pack"] = Field(
        "segment", description="unit of text over which the sources are compared; `pack`: consecutive segments of `pack_length` tokens"
    )
    metric: Literal["bpb", "ce"] = Field(
        "bpb",
        description="`bpb` (bits per byte) compares across tokenizers; `ce` (nats per token) is the papers'; equal for unit `token`",
    )
    pack_length: int | None = Field(
        None, ge=2, description="with unit `pack`: target tokens in a pack, at most; by default corpus.context_length"
    )
    weights: dict[str, Weight] = Field(
        {}, description="with method `fixed`: weight by name of the model, including the target's own start; 0 if left out"
    )
    domain_weights: dict[str, dict[str, Weight]] = Field(
        {}, description="with method `fixed`: other weights for documents of some domains, as `[fusion.domain_weights.<domain>]`"
    )
    fallback: Literal["target", "one_hot", "one_hot_published"] = Field(
        "target",
        description="if no chosen source has a distribution: the `target`'s own start, or all mass on the next token (`one_hot`); the "
        "published code of FuseLLM puts it on the token itself (`one_hot_published`)",
    )
    top_k: int | None = Field(None, ge=1, le=1024, description="entries of each fused distribution; by default as in [distributions]")
