"""Cuts conversations into segments that fit every model's context, without losing a byte or cutting a control token."""

from collections.abc import Sequence

import numpy as np

from ..segment import shortened
from .marked_text import MarkedText
from .reader import ConversationsReader


def segment_conversations(
    conversations: Sequence[MarkedText], *, readers: Sequence[ConversationsReader], context_length: int
) -> list[list[MarkedText]]:
    """Cut each conversation into segments of at most `context_length` tokens for each reader.

    Concatenating a conversation's segments gives the conversation. Cuts are made after an answer of the assistant; if a question and its
    answer do not fit, they are cut like any text.
    """
    fits = np.ones(len(conversations), np.bool_)
    for reader in readers:
        fits &= reader.lengths(conversations) <= context_length
    return [
        [each] if ok else _segment(each, readers=readers, context_length=context_length)
        for each, ok in zip(conversations, fits, strict=True)
    ]


def _segment(conversation: MarkedText, *, readers: Sequence[ConversationsReader], context_length: int) -> list[MarkedText]:
    ends = [_end_of_exchange(conversation, end) for _, end in conversation.assistant_spans]
    places = [0, *(end for end in ends if end < len(conversation.text)), len(conversation.text)]
    found: list[MarkedText] = []
    start = 0
    while start < len(places) - 1:
        pieces = [conversation.cut([place])[0] for place in places[start + 1 :]]
        rests = [piece.cut([places[start]])[1] if start else piece for piece in pieces]
        n = _n_fitting(rests, readers=readers, context_length=context_length)
        found += [rests[n - 1]] if n else _cut_anywhere(rests[0], readers=readers, context_length=context_length)
        start += max(n, 1)
    return found


def _n_fitting(growing: Sequence[MarkedText], *, readers: Sequence[ConversationsReader], context_length: int) -> int:
    """How many of these texts, ordered by length, fit."""
    low, high = 0, len(growing)
    while low < high:
        middle = (low + high + 1) // 2
        if all(reader.lengths([growing[middle - 1]])[0] <= context_length for reader in readers):
            low = middle
        else:
            high = middle - 1
    return low


def _cut_anywhere(piece: MarkedText, *, readers: Sequence[ConversationsReader], context_length: int) -> list[MarkedText]:
    found: list[MarkedText] = []
    while piece.text:
        beginnings = _Beginnings(piece)
        n = max(_n_fitting(beginnings, readers=readers, context_length=context_length), 1)
        if n == len(piece.text):
            return [*found, piece]
        place = beginnings.place(len(shortened(piece.text[:n])))
        first, piece = piece.cut([place]) if place < len(piece.text) else (piece, MarkedText(text=""))
        found.append(first)
    return found


class _Beginnings(Sequence[MarkedText]):
    """The prefixes of a text, of 1, 2, … characters; a prefix that would end inside a control token ends before it."""

    def __init__(self, whole: MarkedText) -> None:
        self._whole = whole

    def __len__(self) -> int:
        return len(self._whole.text)

    def __getitem__(self, index: int) -> MarkedText:  # type: ignore[override]  # no slices
        place = self.place(index + 1)
        return self._whole.cut([place])[0] if place < len(self) else self._whole

    def place(self, place: int) -> int:
        """The nearest place that is not inside a control token: before it, or after it if the text begins with it."""
        for start, end in self._whole.control_spans:
            if start < place < end:
                return start or end
        return place


def _end_of_exchange(conversation: MarkedText, end: int) -> int:
    """The end of a turn, including the template's white space after it."""
    stops = [each.start for each in conversation.messages] + [start for start, _ in conversation.control_spans]
    stop = min((start for start in stops if start >= end), default=len(conversation.text))
    following = conversation.text[end:stop]
    return end + len(following) - len(following.lstrip())
