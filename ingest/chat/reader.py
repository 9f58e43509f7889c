"""Tokenizes rendered conversations for a model: token ids, the byte at which each token ends, and which tokens are the assistant's.

The text is read in runs. A run ends at a control token of the template, and only these become control tokens. It also ends where the
assistant begins and ends, as when a model answers a prompt. So no token has both text that is trained on and text that is not.

A model that reads another model's template replaces a control token with its own of the same spelling, else with that of the same role
(bos, eos, pad, end of turn), else it reads it as text. Or it reads the conversation in its own template; its tokens are then mapped to the
shared text by the assistant's messages.

Axes: T tokens of many segments, S segments, B bytes of a segment.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken

from ...store.arrays import id_dtype
from ...store.errors import DataError
from ...store.tokenizer import NOT_LOSSLESS, EncodedSegments, Tokenizer
from .conversations import Message
from .marked_text import MarkedText, Span
from .placing import has_whole_turns, placed
from .prefixes import without_dummy_prefix
from .template import ChatTemplate, RefusedConversation

Rendering = Literal["own", "shared", "foreign"]  # the model's own; the corpus's, in the model's template; the corpus's, in another template
_Where = Literal["start", "after_control", "inside"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedConversations:
    """Segments of conversations as a model reads them; `segments.byte_ends_T` is in the shared text."""

    segments: EncodedSegments
    label_mask_T: NDArray[np.bool_]  # at position j: token j + 1 of the segment is the assistant's
    scored_bytes_T: NDArray[np.int64]  # at position j: bytes of the assistant's text in that token; 0 for control tokens
    reasons: Mapping[int, str]  # why segments are not lossless


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run of text, or a control token: `control` is its id, None if the model has none and needs none."""

    start: int
    end: int
    is_control: bool
    control: int | None = None
    where: _Where = "inside"


class ConversationsReader:
    """Reads the conversations of a corpus for one model."""

    def __init__(self, tokenizer: Tokenizer, *, template: ChatTemplate, rendering: Rendering, own: ChatTemplate | None = None) -> None:
        """Choose how to read.

        Args:
            tokenizer: the model's.
            template: the template of the text that it reads: with rendering `own` the model's, else the corpus's.
            rendering: which text it reads, in which template.
            own: with rendering `foreign`, the model's own template if it has one: it gives the control token with which the model ends a
            turn (by default its eos), and the tokens that are not text.
        """
        self.tokenizer, self.template, self.rendering, self.own = tokenizer, template, rendering, own

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the reading, besides the tokenizer and the corpus."""
        identity: dict[str, Any] = {"rendering": self.rendering, "end_of_turn": self.end_of_turn_id}
        if self.rendering == "own":
            identity |= self.template.identity
        elif self.rendering == "foreign":
            identity["control_ids"] = {token: self._control_ids.get(token) for token in self.template.written_controls}
            identity["not_text"] = sorted(self._unmarked)
        return identity

    @property
    def end_of_turn_id(self) -> int | None:
        """The token with which the model ends a turn in the text that it reads."""
        return self._control_ids.get(self.template.end_of_turn or "")

    def require_known(self, vocab_size: int) -> None:
        """Raise DataError if a control token of the template has an id without an embedding in the model."""
        for token in self.template.written_controls:
            if self._control_ids.get(token, 0) >= vocab_size:
                raise DataError(
                    f"The id of the chat template's control token {token} ({self._control_ids[token]}) must be below vocab_size "
                    f"({vocab_size}) of the model that reads it. Resize the model's embeddings, or use a template without it."
                )

    def lengths(self, segments: Sequence[MarkedText]) -> NDArray[np.int64]:
        """Tokens of each segment, [S]."""
        return np.diff(self.encode(segments).segments.segment_offsets)

    def encode(self, segments: Sequence[MarkedText]) -> EncodedConversations:
        """Read segments of the corpus."""
        reasons: dict[int, str] = {}
        read = segments if self.rendering != "own" else [self._rendered(s, segment, reasons) for s, segment in enumerate(segments)]
        pieces = [list(self._pieces(segment)) for segment in read]
        runs = self._encoded_runs(read, pieces)
        ids: list[NDArray[np.int64]] = []
        ends: list[NDArray[np.int64]] = []
        labels: list[NDArray[np.bool_]] = []
        scored: list[NDArray[np.int64]] = []
        for s, (segment, shared) in enumerate(zip(read, segments, strict=True)):
            ids_T, ends_T, is_lossless = self._assemble(segment, pieces[s], runs)
            label_T, scored_T = _labels(segment, ends_T, has_bos=self._prepends_bos)
            if not is_lossless:
                reasons.setdefault(s, NOT_LOSSLESS)
            if self.rendering == "own" and s not in reasons:
                ends_T = placed(ends_T, own=segment, shared=shared)
            ids.append(ids_T)
            ends.append(ends_T)
            labels.append(label_T)
            scored.append(scored_T)
        return EncodedConversations(
            segments=EncodedSegments(
                token_ids_T=np.concatenate([*ids, np.zeros(0, np.int64)]).astype(id_dtype(self.tokenizer.vocab_size)),
                segment_offsets=np.cumsum([0, *map(len, ids)]).astype(np.int64),
                n_bytes_S=np.fromiter((len(segment.text.encode()) for segment in segments), np.int64, len(segments)),
                is_lossless_S=np.array([s not in reasons for s in range(len(segments))], np.bool_),
                byte_ends_T=np.concatenate([*ends, np.zeros(0, np.int64)]).astype(np.int32),
            ),
            label_mask_T=np.concatenate([*labels, np.zeros(0, np.bool_)]),
            scored_bytes_T=np.concatenate([*scored, np.zeros(0, np.int64)]),
            reasons=reasons,
        )

    # ---- control tokens ----------------------------------------------------------------------------------------------------------------

    @property
    def _prepends_bos(self) -> bool:
        """The model's own template places bos itself; with another template, bos is placed as in plain text."""
        return self.rendering == "foreign" and self.tokenizer.prepends_bos

    @cached_property
    def _control_ids(self) -> dict[str, int]:
        """The model's token for each control token of the template; those without one are read as text."""
        backend, roles = self.tokenizer.backend, self.tokenizer.roles
        if self.rendering != "foreign":
            ids = {token: backend.token_to_id(token) for token in self.template.controls}
            return {token: token_id for token, token_id in ids.items() if token_id is not None}
        variables, end_of_turn = self.template.variables, self.template.end_of_turn
        found = {token.content: token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special}
        own_end = backend.token_to_id(self.own.end_of_turn) if self.own and self.own.end_of_turn else None
        by_role = [
            (end_of_turn, own_end),
            *((variables.get(f"{role}_token"), roles[role]) for role in ("eos", "pad")),
            (end_of_turn, roles["eos"]),
        ]
        for token, token_id in by_role:  # of several roles, the first for which the model has a token counts
            if token is not None and token_id is not None:
                found.setdefault(token, token_id)
        return {token: found[token] for token in self.template.controls if token in found}

    def _pieces(self, segment: MarkedText) -> Iterator[_Piece]:
        place = 0
        bos = self.template.variables.get("bos_token")
        for start, end in segment.control_spans:
            token = segment.text[start:end]
            is_bos = self.rendering == "foreign" and start == 0 and token == bos and not self.template.bos_begins_turns
            if token not in self._control_ids and not is_bos:
                continue
            yield from _runs(segment, place, start)
            own_bos = None if self._prepends_bos else self.tokenizer.roles["bos"]  # one bos is enough
            control = own_bos if is_bos else self._control_ids[token]
            place = end + (_stripped(segment, end) if control in self._right_stripping else 0)
            # Text that the template wrote after the assistant's turn belongs to the next token: the turn ends exactly at its last byte.
            is_end_of_turn = any(turn_end == end for _, turn_end in segment.assistant_spans)
            yield _Piece(start, end if is_end_of_turn else place, True, control)
        yield from _runs(segment, place, len(segment.text))

    @cached_property
    def _right_stripping(self) -> frozenset[int]:
        """Control tokens that absorb the white space after them."""
        return frozenset(token_id for token_id, token in self.tokenizer.backend.get_added_tokens_decoder().items() if token.rstrip)

    # ---- text --------------------------------------------------------------------------------------------------------------------------

    @cached_property
    def _tokenizers(self) -> dict[_Where, Tokenizer]:
        """The tokenizers for a run at the text's start, after a control token, and after another run, without control tokens."""
        definition = self.tokenizer.definition
        if not self.tokenizer.has_dummy_prefix:
            same = self._text_tokenizer(definition)
            return {"start": same, "after_control": same, "inside": same}
        return {
            "start": self._text_tokenizer(definition),
            "after_control": self._text_tokenizer(without_dummy_prefix(definition, only_first=True)),
            "inside": self._text_tokenizer(without_dummy_prefix(definition, only_first=False)),
        }

    def _text_tokenizer(self, definition: str) -> Tokenizer:
        tokenizer = Tokenizer(definition, roles=self.tokenizer.roles, prepends_bos=False)
        tokenizer.backend.add_special_tokens([AddedToken(content, special=True) for content in self._unmarked])
        return tokenizer

    @property
    def _unmarked(self) -> list[str]:
        """Tokens that a template writes around messages, and that the tokenizer also makes from text."""
        added = self.tokenizer.backend.get_added_tokens_decoder().values()
        controls = self.template.controls | (self.own.controls if self.own else frozenset())
        return [token.content for token in added if not token.special and token.content in controls]

    def _encoded_runs(self, segments: Sequence[MarkedText], pieces: Sequence[Sequence[_Piece]]) -> dict[_Where, Iterator["_Run"]]:
        """The runs of all segments, in order."""
        texts: dict[_Where, list[str]] = {"start": [], "after_control": [], "inside": []}
        for segment, of_segment in zip(segments, pieces, strict=True):
            for piece in of_segment:
                if not piece.is_control:
                    texts[piece.where].append(segment.text[piece.start : piece.end])
        return {where: _read_runs(of_place, tokenizer=self._tokenizers[where]) for where, of_place in texts.items()}

    def _assemble(
        self, segment: MarkedText, pieces: Sequence[_Piece], runs: Mapping[_Where, Iterator["_Run"]]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], bool]:
        """A segment's tokens, the byte at which each ends, and whether they are its text."""
        place = segment.byte_offsets()
        bos = self.tokenizer.roles["bos"]
        ids: list[int] = [bos] if self._prepends_bos and bos is not None else []
        ends: list[int] = [0] * len(ids)
        is_lossless = True
        for piece in pieces:
            if not piece.is_control:
                run = next(runs[piece.where])
                ids += run.ids
                ends += [place(piece.start) + end for end in run.ends]
                is_lossless &= run.is_lossless
            elif piece.control is not None:
                ids.append(piece.control)
                ends.append(place(piece.end))
            elif ends:  # the previous token covers it too
                ends[-1] = place(piece.end)
        return np.array(ids, np.int64), np.array(ends, np.int64), is_lossless

    # ---- the model's own rendering -----------------------------------------------------------------------------------------------------

    def _rendered(self, s: int, segment: MarkedText, reasons: dict[int, str]) -> MarkedText:
        """A segment's messages in the model's own template; None, with a reason, if that is not possible."""
        if not has_whole_turns(segment):
            reasons[s] = "a message goes beyond the segment, but the model reads whole messages, in its own chat template"
            return MarkedText(text="")
        try:
            return self.template.render(tuple(Message(each.role, segment.text[each.start : each.end]) for each in segment.messages))  # type: ignore[arg-type]
        except RefusedConversation as error:
            reasons[s] = f"in the model's own chat template: {error}"
            return MarkedText(text="")


@dataclass(frozen=True, slots=True)
class _Run:
    ids: list[int]
    ends: list[int]  # bytes from the run's start
    is_lossless: bool


def _read_runs(texts: Sequence[str], *, tokenizer: Tokenizer) -> Iterator[_Run]:
    encoded = tokenizer.encode_segments(texts)
    offsets = encoded.segment_offsets
    ends_T: NDArray[Any] | None = encoded.byte_ends_T
    if ends_T is None:
        ends_T = tokenizer.byte_ends(encoded.token_ids_T, segment_offsets=offsets, n_bytes_S=encoded.n_bytes_S)
    ids, ends = encoded.token_ids_T.tolist(), np.maximum(ends_T, 0).tolist()
    for s, (start, end) in enumerate(pairwise(offsets.tolist())):
        yield _Run(ids[start:end], ends[start:end], bool(encoded.is_lossless_S[s]))


def _runs(segment: MarkedText, start: int, end: int) -> Iterator[_Piece]:
    """The runs between two control tokens."""
    places = sorted({place for span in segment.assistant_spans for place in span if start < place < end})
    for a, b in pairwise((start, *places, end)):
        if a < b:
            yield _Piece(a, b, False, where="inside" if a > start else "start" if a == 0 else "after_control")


def _stripped(segment: MarkedText, place: int) -> int:
    """How much of the template's white space follows a place."""
    starts = (*(each.start for each in segment.messages), *(start for start, _ in segment.assistant_spans))
    following = segment.text[place : min((start for start in starts if start >= place), default=len(segment.text))]
    return len(following) - len(following.lstrip())


def _labels(segment: MarkedText, ends_T: NDArray[np.int64], *, has_bos: bool) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which positions predict a token of the assistant, and how many bytes of the assistant's text that token has."""
    place = segment.byte_offsets()
    n_bytes = place(len(segment.text))
    is_assistant_B = _covered(segment.assistant_spans, place=place, n_bytes=n_bytes)
    is_text_B = is_assistant_B & ~_covered(segment.control_spans, place=place, n_bytes=n_bytes)
    assistant_T, text_T = (np.concatenate([[0], np.cumsum(is_B)])[ends_T] for is_B in (is_assistant_B, is_text_B))
    labels_T = np.append(assistant_T[1:] > assistant_T[:-1], np.zeros(min(len(ends_T), 1), np.bool_))
    scored_T = np.append(np.diff(text_T), np.zeros(min(len(ends_T), 1), np.int64))
    labels_T[: int(has_bos)] = False  # in a segment that begins inside an answer, bos does not predict its first token
    return labels_T, np.where(labels_T, scored_T, 0)


def _covered(spans: Sequence[Span], *, place: Any, n_bytes: int) -> NDArray[np.bool_]:
    covered_B = np.zeros(n_bytes, np.bool_)
    for start, end in spans:
        covered_B[place(start) : place(end)] = True
    return covered_B
