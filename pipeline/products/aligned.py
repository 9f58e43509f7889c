"""Products that map a source's tokens and positions to the target's: token matches, vocabulary maps, alignments."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...align.alignments import AlignmentsStage, alignment_identity
from ...align.maps import VocabularyMapStage, end_of_turn, vocabulary_map_identity
from ...align.matches import TokenMatchesStage, matches_identity
from ...store.fingerprint import Identity
from .cost import Cost, Sizes
from .forward import Distributions
from .product import Drawing, OpenSite, PartsProduct, Product, Site, opened

_MATCHES_BYTES = 0.3  # per token: a part of 1M tokens has about 60,000 different pairs
_MAP_BYTES, _ALIGNMENT_BYTES = 14, 1.5  # per source token, per token of the corpus


@dataclass(frozen=True, eq=False, kw_only=True)
class PairProduct(PartsProduct):
    """A product of a source and the target."""

    command: ClassVar[str] = "align"

    source: Distributions
    target: Distributions

    @property
    def role(self) -> str:
        return self.source.role

    @property
    def pair(self) -> str:
        """`<source>--<target>`."""
        return f"{self.source.name}--{self.target.name}"

    @property
    def inputs(self) -> tuple[Product, ...]:
        return (self.source, self.target)

    def sides(self, site: OpenSite) -> dict[str, Any]:
        """The inputs of a stage over a source and the target."""
        return {
            "source": site.dataset(self.source),
            "target": site.dataset(self.target),
            "source_tokenizer_folder": site.tokenizer_folder(site.model(self.source)),
            "target_tokenizer_folder": site.tokenizer_folder(site.model(self.target)),
        }


def _pairs(drawing: Drawing) -> Iterator[dict[str, Any]]:
    target = drawing.get(Distributions, drawing.recipe.target.name)
    for source in drawing.recipe.sources:
        yield {"recipe": drawing.recipe, "source": drawing.get(Distributions, source.name), "target": target}


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenMatches(PairProduct):
    """`token_matches/<source>--<target>--<positions>`, for the vocabulary map `stat`."""

    kind: ClassVar[str] = "token_matches"
    noun: ClassVar[str] = "token matches"

    @classmethod
    def of(cls, drawing: Drawing) -> Iterator["TokenMatches"]:
        if drawing.recipe.alignment.vocabulary == "stat":
            yield from (cls(**pair) for pair in _pairs(drawing))

    @property
    def name(self) -> str:
        return self.suffixed(self.recipe.alignment.matches_name(self.pair))

    @property
    def title(self) -> str:
        return f"{self.noun} {self.pair}"

    @property
    def choices(self) -> Mapping[str, Any]:
        return {"positions": self.recipe.alignment.positions}

    def identity(self, site: Site) -> Identity:
        return matches_identity(site.dataset(self.source), target=site.dataset(self.target), positions=self.recipe.alignment.positions)

    def stage(self, site: OpenSite) -> TokenMatchesStage:
        return TokenMatchesStage(site.dataset(self), positions=self.recipe.alignment.positions, **self.sides(site))

    def cost(self, sizes: Sizes) -> Cost:
        tokens = sizes.tokens(self, "train")
        return Cost(stored_bytes=_MATCHES_BYTES * tokens, tokens=tokens)


@dataclass(frozen=True, eq=False, kw_only=True)
class VocabularyMap(PairProduct):
    """`vocab_maps/<source>--<target>--<rule>`. It depends only on the tokenizers; `stat` also on counts of matches."""

    kind: ClassVar[str] = "vocab_maps"
    noun: ClassVar[str] = "vocabulary map"

    matches: TokenMatches | None

    @classmethod
    def of(cls, drawing: Drawing) -> Iterator["VocabularyMap"]:
        counts = drawing.recipe.alignment.vocabulary == "stat"
        for pair in _pairs(drawing):
            yield cls(**pair, matches=drawing.get(TokenMatches, pair["source"].role) if counts else None)

    @property
    def name(self) -> str:
        return self.suffixed(self.recipe.alignment.map_name(self.pair))

    @property
    def title(self) -> str:
        return f"{self.noun} {self.pair}"

    @property
    def inputs(self) -> tuple[Product, ...]:
        return () if self.matches is None else (self.matches,)  # beside the models

    @property
    def choices(self) -> Mapping[str, Any]:
        models = [side.choices["of"] | {"rendering": side.rendering} for side in (self.source, self.target)]
        chat = self.recipe.corpus.chat  # its template sets the token that ends a turn
        return {"rule": self.recipe.alignment.vocabulary, "models": models, "chat": None if chat is None else chat.model_dump()}

    @property
    def split(self) -> None:
        return None

    def identity(self, site: Site) -> Identity:
        digests, ends = self._tokenizers(site)
        return vocabulary_map_identity(
            digests[0],
            target=digests[1],
            rule=self.recipe.alignment.vocabulary,
            matches=None if self.matches is None else site.dataset(self.matches),
            end_of_turn=ends,
        )

    def _tokenizers(self, site: Site) -> tuple[list[str], tuple[int, int] | None]:
        """Digests of both tokenizers, and the tokens that end a turn: from the models, or from what is stored of them."""
        sides, place = (self.source, self.target), opened(site)
        if place is None:
            datasets = [site.dataset(side) for side in sides]
            return [dataset.identity["tokenizer"] for dataset in datasets], end_of_turn(datasets[0], target=datasets[1])
        tokenizers = [place.model(side).tokenizer for side in sides]
        readings = [place.reading(side) for side in sides]
        ends = [
            None if reading is None else reading.reader(tokenizer).identity.get("end_of_turn")
            for reading, tokenizer in zip(readings, tokenizers, strict=True)
        ]
        both = None if ends[0] is None or ends[1] is None else (ends[0], ends[1])
        return [tokenizer.digest for tokenizer in tokenizers], both

    def stage(self, site: OpenSite) -> VocabularyMapStage:
        return VocabularyMapStage(
            site.dataset(self),
            source=site.model(self.source).tokenizer,
            target=site.model(self.target).tokenizer,
            rule=self.recipe.alignment.vocabulary,
            matches=None if self.matches is None else site.dataset(self.matches),
            parts=[] if self.matches is None else site.parts(self.matches),
            end_of_turn=self._tokenizers(site)[1],
        )

    def cost(self, sizes: Sizes) -> Cost:
        return Cost(stored_bytes=_MAP_BYTES * sizes.model(self.source).vocab_size)


@dataclass(frozen=True, eq=False, kw_only=True)
class Alignment(PairProduct):
    """`alignments/<source>--<target>`: the position in the source of each target position."""

    kind: ClassVar[str] = "alignments"
    noun: ClassVar[str] = "alignment"

    vocabulary_map: VocabularyMap | None  # if the position map depends on it

    @classmethod
    def of(cls, drawing: Drawing) -> Iterator["Alignment"]:
        reads_map = drawing.recipe.alignment.reads_map
        for pair in _pairs(drawing):
            yield cls(**pair, vocabulary_map=drawing.get(VocabularyMap, pair["source"].role) if reads_map else None)

    @property
    def name(self) -> str:
        return self.suffixed(self.recipe.alignment.alignment_name(self.pair))

    @property
    def title(self) -> str:
        return f"{self.noun} {self.pair}"

    @property
    def inputs(self) -> tuple[Product, ...]:
        return (*super().inputs, *([] if self.vocabulary_map is None else [self.vocabulary_map]))

    @property
    def choices(self) -> Mapping[str, Any]:
        alignment = self.recipe.alignment
        return {"positions": alignment.positions, "match": alignment.dtw_match if alignment.positions == "dtw" else None}

    def _keys(self, site: Site) -> dict[str, Any]:
        """The choices and the map, for the identity and the stage."""
        return {**self.choices, "vocabulary_map": None if self.vocabulary_map is None else site.dataset(self.vocabulary_map)}

    def identity(self, site: Site) -> Identity:
        return alignment_identity(site.dataset(self.source), target=site.dataset(self.target), **self._keys(site))

    def stage(self, site: OpenSite) -> AlignmentsStage:
        return AlignmentsStage(site.dataset(self), **self._keys(site), **self.sides(site))

    def cost(self, sizes: Sizes) -> Cost:
        tokens = sizes.tokens(self, "train")
        return Cost(stored_bytes=_ALIGNMENT_BYTES * tokens, tokens=tokens)
