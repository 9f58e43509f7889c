"""A document's tokens under a source's and the target's tokenizer, and its distributions before and after the map, read from the store.

Axes: T positions of the target's part, U of the source's, S segments, K entries of a stored position, C of a projection.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..store.corpus_plan import read_documents, read_plan
from ..store.dataset import Dataset
from ..store.errors import DataError, UsageError
from ..store.tokenizer import Tokenizer, token_texts
from ..store.workspace import Workspace
from .pair import reading
from .projection import Projection
from .sources import FusionSource, gold_ids

Entries = list[tuple[int, float]]  # token ids and probabilities, by falling probability
_ROW_BYTES = 160  # of text side by side, about


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePosition:
    """A position of the source: its token, and the source's prediction of the next one."""

    token: int
    next_token: int | None  # None at the end of a segment
    next_prob: float | None
    entries: Entries


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetPosition:
    """A position of the target, and the source's distribution there before and after the map."""

    token: int
    next_token: int | None
    source: int | None  # index into `source_positions`; None if the source has no distribution
    ahead: int  # bytes that the target has read beyond the source position
    entries: Entries  # of the source, after the map: target tokens
    own_entries: Entries  # of the target's own start
    mapped: float
    merged: float
    lost: float
    tail: float
    next_prob: float | None  # of the next token, after the map
    own_next_prob: float | None  # of the next token, under the target's own start


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A stretch of text: the positions of both models whose tokens are in it. The last two match; except for `dtw`, at the same byte."""

    segment: int
    source: range
    target: range


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Figures over everything that is shown.

    Bits per byte count the text's tokens after the first, in each segment; in conversations, the assistant's.
    """

    positions: int
    same: int  # positions at which both have read the same; for `dtw`, matched ones
    inside: int  # positions inside a source token at which the source has a distribution
    text_bytes: int
    source_bpb: float | None  # in its own tokens
    mapped_bpb: float | None  # of the source, after the map, over the bytes of the tokens to which it gives any probability
    mapped_bytes: float  # these bytes, as a share of all scored bytes
    target_bpb: float | None
    agreement: float | None  # share of aligned positions at which both have the same most probable target token
    mapped: float  # means over the aligned positions
    merged: float
    lost: float
    tail: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownDocument:
    """Everything to show for one document under one alignment."""

    source_name: str
    target_name: str
    alignment: str
    positions: str  # the alignment's position map: `cover`, `span` or `dtw`
    vocabulary_map: str
    corpus: str
    doc_id: int
    domain: str | None
    segments: list[int]
    source_texts: Mapping[int, str]  # of every token in it
    target_texts: Mapping[int, str]
    source_positions: list[SourcePosition]
    target_positions: list[TargetPosition]
    rows: list[Row]
    summary: Summary


def show_alignment(
    workspace: Workspace, *, doc_id: int, alignment: str | None = None, vocabulary_map: str | None = None, segment: int | None = None
) -> ShownDocument:
    """Collect a document of the train split, or one segment of it.

    Args:
        workspace: the workspace.
        doc_id: the document.
        alignment: name of the alignment, such as `<source>--<target>`; by default the only one.
        vocabulary_map: name of the vocabulary map; by default that of the fused targets, else the only one for these tokenizers.
        segment: only this segment of the document.

    Raises:
        UsageError: one of these does not exist, or must be named.
        DataError: the aligned distributions, or a part of them, are not in the workspace any more.
    """
    aligned = _chosen(workspace, "alignments", alignment)
    source, target = (_distributions(workspace, aligned, role=role) for role in ("source", "target"))
    mapped, how = _vocabulary_map(workspace, aligned, source=source, target=target, name=vocabulary_map)
    part, domain = _place(workspace, aligned, doc_id=doc_id)
    for dataset in (source, target, aligned):
        if part not in dataset.parts():
            raise DataError(f"{dataset.kind}/{dataset.name} lacks part {part} with document {doc_id}. Make it with: fuseline run RECIPE.")
    pair = _Pair(source, target=target, alignment=aligned, vocabulary_map=mapped, how=how, part=part)
    chosen = pair.segments_of(doc_id, segment=segment)
    rows: list[Row] = []
    source_positions: list[SourcePosition] = []
    target_positions: list[TargetPosition] = []
    for s in chosen:
        there, here = pair.source_span(s), range(pair.offsets[s], pair.offsets[s + 1])
        shift = len(source_positions) - there.start
        first = len(target_positions)
        rows += pair.rows(s, source=there, source_shift=shift, target_shift=first - here.start)
        source_positions += [pair.source_position(u, end=there.stop) for u in there]
        target_positions += [pair.target_position(t, end=here.stop, source_shift=shift) for t in here]
    return ShownDocument(
        source_name=source.name,
        target_name=target.name,
        alignment=aligned.name,
        positions=aligned.identity["positions"],
        vocabulary_map=mapped.name,
        corpus=aligned.description["corpus"],
        doc_id=doc_id,
        domain=domain,
        segments=[int(pair.segment_S[s]) for s in chosen],
        source_texts=_texts(workspace, source, _source_tokens(source_positions)),
        target_texts=_texts(workspace, target, _target_tokens(target_positions)),
        source_positions=source_positions,
        target_positions=target_positions,
        rows=rows,
        summary=pair.summary(chosen, bytes_T=_token_bytes(workspace, target, part=part)),
    )


def _source_tokens(positions: list[SourcePosition]) -> Iterator[int | None]:
    for position in positions:
        yield from (position.token, position.next_token, *(token for token, _ in position.entries))


def _target_tokens(positions: list[TargetPosition]) -> Iterator[int | None]:
    for position in positions:
        yield from (position.token, position.next_token, *(token for token, _ in position.entries + position.own_entries))


def _texts(workspace: Workspace, dataset: Dataset, tokens: Iterator[int | None]) -> dict[int, str]:
    texts = token_texts(workspace.folder("tokenizers", dataset.identity["tokenizer"]))
    return {token: texts[token] if token < len(texts) else "" for token in set(tokens) if token is not None}


def _token_bytes(workspace: Workspace, dataset: Dataset, *, part: int) -> NDArray[np.int64]:
    """Number of bytes of the text of each token after its segment's first; 0 for control tokens."""
    tokenizer = Tokenizer.load(workspace.folder("tokenizers", dataset.identity["tokenizer"]))
    read = reading(dataset, part=part, tokenizer=tokenizer)
    bytes_T = np.diff(read.byte_ends(dummy_prefix=False), prepend=0)
    return np.where(tokenizer.token_bytes.is_special_V[read.side.token_ids_T], 0, bytes_T)


# ---- which datasets --------------------------------------------------------------------------------------------------------------------


def _chosen(workspace: Workspace, kind: str, name: str | None) -> Dataset:
    found = {dataset.name: dataset for dataset in workspace.datasets() if dataset.kind == kind}
    if not found:
        raise UsageError(f"{workspace.root} has no {kind} yet. Make them with: fuseline align RECIPE.")
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    if name not in found:
        problem = "Choose one with --alignment" if name is None else f"There is no alignment {name}"
        raise UsageError(f"{problem}; there are: {', '.join(found)}.")
    return found[name]


def _distributions(workspace: Workspace, alignment: Dataset, *, role: str) -> Dataset:
    named = alignment.name.split("--")[("source", "target").index(role)]
    found = [
        dataset for dataset in workspace.datasets() if dataset.kind == "distributions" and dataset.fingerprint == alignment.identity[role]
    ]
    if found:  # several if a model is stored under two names
        return next((dataset for dataset in found if dataset.name == named), found[0])
    raise DataError(f"alignments/{alignment.name} was made from distributions of its {role} that are not in {workspace.root} any more.")


def _vocabulary_map(
    workspace: Workspace, alignment: Dataset, *, source: Dataset, target: Dataset, name: str | None
) -> tuple[Dataset, dict[str, Any]]:
    """The vocabulary map, and the projection's settings from the targets that were fused with this map.

    The positions of `cover` need the rests of tokens, which only some maps have.
    """
    digests = {"source": source.identity["tokenizer"], "target": target.identity["tokenizer"]}
    maps = {
        dataset.fingerprint: dataset
        for dataset in workspace.datasets()
        if dataset.kind == "vocab_maps" and {key: dataset.identity[key] for key in digests} == digests
    }
    covers = alignment.identity["positions"] == "cover"
    maps = {key: dataset for key, dataset in maps.items() if not covers or _knows_rests(dataset)}
    used: dict[str, dict[str, Any]] = {}
    for dataset in workspace.datasets():
        for parts in dataset.identity["sources"] if dataset.kind == "targets" else ():
            if parts[1:2] == [alignment.fingerprint] and parts[2] in maps:
                used[parts[2]] = {
                    "gold_anchor": dataset.identity["gold_anchor"],
                    "collisions": dataset.identity.get("collisions", "sum"),
                }
    candidates = [key for key, dataset in maps.items() if (dataset.name == name if name is not None else not used or key in used)]
    if len(candidates) != 1:
        names = ", ".join(sorted(dataset.name for dataset in maps.values())) or "none: make one with fuseline align RECIPE"
        which = "with rests of tokens, which cover needs, there are" if covers else "there are"
        problem = "Choose with --map one of the" if name is None else f"There is no {name} among the"
        raise UsageError(f"{problem} vocabulary maps to show alignments/{alignment.name} with; {which}: {names}.")
    return maps[candidates[0]], used.get(candidates[0], {"gold_anchor": alignment.identity["positions"] != "dtw"})


def _knows_rests(vocabulary_map: Dataset) -> bool:
    return bool(vocabulary_map.parts()) and "rest_target_ids" in vocabulary_map.table(0).columns


def _place(workspace: Workspace, alignment: Dataset, *, doc_id: int) -> tuple[int, str | None]:
    """The part and the domain of a document."""
    corpus = alignment.description["corpus"]
    folder = workspace.folder("corpus", corpus)
    summary = read_plan(folder)
    if summary is None:
        raise DataError(f"{folder} is missing, so its documents cannot be found. Make it again with: fuseline ingest corpus RECIPE.")
    documents = read_documents(folder, summary=summary)
    row = documents.filter(doc_id=doc_id)
    if not len(row):
        raise UsageError(f"There is no document {doc_id} in corpus/{corpus}: it has the documents 0 to {len(documents) - 1}.")
    if row["split"][0] != "train":
        raise UsageError(
            f"Document {doc_id} is in the split {row['split'][0]}, but only documents of the train split are aligned. Find one with: "
            "fuseline sql \"SELECT doc_id, domain FROM documents WHERE split = 'train'\""
        )
    return row["part"][0], row["domain"][0]


# ---- one part --------------------------------------------------------------------------------------------------------------------------


class _Pair:
    """A part of both models, and the source's distributions before and after the map."""

    def __init__(
        self, source: Dataset, *, target: Dataset, alignment: Dataset, vocabulary_map: Dataset, how: dict[str, Any], part: int
    ) -> None:
        self.source, self.target, self.part = source, target, part
        read = ("token_ids_T", "segment_offsets", "doc_id_S", "segment_S", "n_bytes_S", "nll_S", "n_scored_S", "scored_bytes_S")
        self.token_ids_T, self.offsets, self.doc_id_S, self.segment_S, self.n_bytes_S, *self.likelihood = target.read(part, *read)
        self.token_ids_U, self.source_offsets, self.source_doc_id_S, self.source_segment_S, _, *self.source_likelihood = source.read(
            part, *read
        )
        self.label_mask_T = target.arrays(part).read_if_there("label_mask_T")
        gold_ids_T = gold_ids(self.token_ids_T, offsets=self.offsets)
        fusion_source = FusionSource(name=source.name, distributions=source, alignment=alignment, vocabulary_map=vocabulary_map)
        self.stored = fusion_source.read(part)
        self.projection = fusion_source.project(part, gold_ids_T=gold_ids_T, **how)
        self.own = FusionSource(name=target.name, distributions=target).project(part, gold_ids_T=gold_ids_T, **how)
        self.ahead_T = self.stored.ahead_T if self.stored.ahead_T is not None else np.zeros(len(self.token_ids_T), np.uint16)

    def segments_of(self, doc_id: int, *, segment: int | None) -> list[int]:
        """Indices of a document's segments in the target's part."""
        of_document = np.flatnonzero(self.doc_id_S == doc_id).tolist()
        if not of_document:
            raise DataError(
                f"distributions/{self.target.name} has left out document {doc_id}. See the reason with: "
                f'fuseline sql "SELECT reason FROM quarantine WHERE doc_id = {doc_id}"'
            )
        chosen = [s for s in of_document if segment in (None, int(self.segment_S[s]))]
        if not chosen:
            raise UsageError(
                f"Document {doc_id} has no segment {segment}: it has the segments 0 to {int(self.segment_S[of_document].max())}."
            )
        return chosen

    def source_span(self, s: int) -> range:
        """The source's positions of a segment of the target; none if the source left it out."""
        place = self._source_place(s)
        return range(0) if place is None else range(int(self.source_offsets[place]), int(self.source_offsets[place + 1]))

    def _source_place(self, s: int) -> int | None:
        (found,) = np.nonzero((self.source_doc_id_S == self.doc_id_S[s]) & (self.source_segment_S == self.segment_S[s]))
        return int(found[0]) if len(found) else None

    def source_position(self, u: int, *, end: int) -> SourcePosition:
        """One position of the source; its segment ends at `end`."""
        has_next = u + 1 < end
        return SourcePosition(
            token=int(self.token_ids_U[u]),
            next_token=int(self.token_ids_U[u + 1]) if has_next else None,
            next_prob=float(np.exp(self.stored.gold_logprob_U[u])) if has_next else None,
            entries=_sorted(self.stored.topk_ids_UK[u], self.stored.topk_probs_UK[u]),
        )

    def target_position(self, t: int, *, end: int, source_shift: int) -> TargetPosition:
        """One position of the target; its segment ends at `end`, and source positions count from `-source_shift`."""
        projection, has_next = self.projection, t + 1 < end
        is_aligned = bool(projection.is_aligned_T[t])
        return TargetPosition(
            token=int(self.token_ids_T[t]),
            next_token=int(self.token_ids_T[t + 1]) if has_next else None,
            source=int(self.stored.position_T[t]) + source_shift if is_aligned else None,
            ahead=int(self.ahead_T[t]) if is_aligned else 0,
            entries=_entries(projection, t),
            own_entries=_entries(self.own, t),
            mapped=float(projection.mapped_T[t]),
            merged=float(projection.merged_T[t]),
            lost=float(projection.lost_T[t]),
            tail=float(projection.tail_T[t]),
            next_prob=float(np.exp(projection.gold_logprob_T[t])) if has_next and is_aligned else None,
            own_next_prob=float(np.exp(self.own.gold_logprob_T[t])) if has_next else None,
        )

    def rows(self, s: int, *, source: range, source_shift: int, target_shift: int) -> list[Row]:
        """Cut a segment into rows, at positions where both have read the same, or that are matched."""
        rows, first_t, first_u, start = [], int(self.offsets[s]), source.start, 0.0
        lengths = np.diff(self.offsets)
        per_token = int(self.n_bytes_S[s]) / max(int(lengths[s]), 1)
        end_t = int(self.offsets[s + 1])
        for t in range(first_t, end_t):
            start += per_token
            is_shared = self.projection.is_aligned_T[t] and self.ahead_T[t] == 0
            if (is_shared and start >= _ROW_BYTES) or t + 1 == end_t:
                stop_u = source.stop if t + 1 == end_t else int(self.stored.position_T[t]) + 1
                rows.append(
                    Row(
                        segment=int(self.segment_S[s]),
                        source=range(first_u + source_shift, stop_u + source_shift),
                        target=range(first_t + target_shift, t + 1 + target_shift),
                    )
                )
                first_t, first_u, start = t + 1, stop_u, 0.0
        return rows

    def summary(self, chosen: list[int], *, bytes_T: NDArray[np.int64]) -> Summary:
        """Figures over some segments; `bytes_T` is the number of bytes of the text of each target token."""
        at_T = np.concatenate([np.arange(self.offsets[s], self.offsets[s + 1]) for s in chosen])
        projection = self.projection
        is_aligned = projection.is_aligned_T[at_T]
        scored_T = np.concatenate([self._scored(s) for s in chosen])
        bytes_T = bytes_T[scored_T + 1]
        logprob_T = projection.gold_logprob_T[scored_T]
        has_gold_T = np.isfinite(logprob_T)
        favourites, own_favourites = (
            [entries[0][0] if entries else -1 for entries in (_entries(of, int(t)) for t in at_T[is_aligned])]
            for of in (projection, self.own)
        )
        places = [place for s in chosen if (place := self._source_place(s)) is not None]

        def mean(mass_T: NDArray[Any]) -> float:
            return float(mass_T[at_T][is_aligned].mean()) if is_aligned.any() else 0.0

        return Summary(
            positions=len(at_T),
            same=int((is_aligned & (self.ahead_T[at_T] == 0)).sum()),
            inside=int((is_aligned & (self.ahead_T[at_T] > 0)).sum()),
            text_bytes=int(self.n_bytes_S[chosen].sum()),
            source_bpb=_bpb(self.source_likelihood, places),
            mapped_bpb=_ratio(-logprob_T[has_gold_T].sum(), bytes_T[has_gold_T].sum() * np.log(2)),
            mapped_bytes=_ratio(bytes_T[has_gold_T].sum(), bytes_T.sum()) or 0.0,
            target_bpb=_bpb(self.likelihood, chosen),
            agreement=_ratio(sum(map(int.__eq__, favourites, own_favourites)), len(favourites)),
            mapped=mean(projection.mapped_T),
            merged=mean(projection.merged_T),
            lost=mean(projection.lost_T),
            tail=mean(projection.tail_T),
        )

    def _scored(self, s: int) -> NDArray[np.int64]:
        """The target's positions whose next token is scored: all except those that predict a text's first token.

        In a conversation, those that predict the assistant's tokens.
        """
        if self.label_mask_T is not None:
            return int(self.offsets[s]) + np.flatnonzero(self.label_mask_T[self.offsets[s] : self.offsets[s + 1]])
        n_scored = int(self.likelihood[1][s])
        return np.arange(int(self.offsets[s + 1]) - 1 - n_scored, int(self.offsets[s + 1]) - 1)


def _sorted(ids_K: NDArray[Any], probs_K: NDArray[Any]) -> Entries:
    pairs = zip(ids_K.tolist(), probs_K.tolist(), strict=True)
    return sorted(((token, prob) for token, prob in pairs if prob > 0), key=lambda entry: (-entry[1], entry[0]))


def _entries(projection: Projection, t: int) -> Entries:
    n = projection.n_T[t]
    return _sorted(projection.ids_TC[t, :n], projection.probs_TC[t, :n])


def _bpb(likelihood: list[NDArray[Any]], places: list[int]) -> float | None:
    nll_S, _, scored_bytes_S = likelihood
    return _ratio(nll_S[places].sum(), scored_bytes_S[places].sum() * np.log(2))


def _ratio(amount: Any, of: Any) -> float | None:
    return float(amount / of) if of > 0 else None
