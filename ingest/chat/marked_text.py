"""A rendered conversation, or a segment of one: its text, with marked ranges.

Ranges are half-open; in memory they count characters, in the columns of the corpus's parts bytes of UTF-8:

    control_spans      control tokens that the template wrote: only these become control tokens, never the text of messages
    assistant_spans    what the assistant writes, including its end-of-turn token: this is trained on and evaluated
    messages           role and range of each message's text, and whether it is all of the message
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import polars as pl

Span = tuple[int, int]
_SPANS = pl.List(pl.Struct({"start": pl.UInt32, "end": pl.UInt32}))
_MESSAGES = pl.List(pl.Struct({"role": pl.String, "start": pl.UInt32, "end": pl.UInt32, "is_whole": pl.Boolean}))


class MessageSpan(NamedTuple):
    """The range of a message's text."""

    role: str
    start: int
    end: int
    is_whole: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedText:
    """Text of conversations with its ranges, in characters, ascending."""

    text: str
    control_spans: tuple[Span, ...] = ()
    assistant_spans: tuple[Span, ...] = ()
    messages: tuple[MessageSpan, ...] = ()

    def cut(self, places: Sequence[int]) -> list["MarkedText"]:
        """Cut the text at some ascending places. No place may be inside a control token."""
        return [self._piece(start, end) for start, end in pairwise((0, *places, len(self.text)))]

    def _piece(self, start: int, end: int) -> "MarkedText":
        return MarkedText(
            text=self.text[start:end],
            control_spans=tuple(_within(self.control_spans, start, end)),
            assistant_spans=tuple(_within(self.assistant_spans, start, end)),
            messages=tuple(
                MessageSpan(each.role, a, b, each.is_whole and b - a == each.end - each.start)
                for each in self.messages
                for a, b in _within([(each.start, each.end)], start, end, keeps_empty=True)
            ),
        )

    def byte_offsets(self) -> Callable[[int], int]:
        """The function from an offset in characters to the offset in bytes."""
        if self.text.isascii():
            return lambda place: place
        ends = np.cumsum([0, *(len(character.encode()) for character in self.text)]).tolist()
        return lambda place: ends[place]


def _within(spans: Sequence[Span], start: int, end: int, *, keeps_empty: bool = False) -> Iterator[Span]:
    for a, b in spans:
        if max(a, start) < min(b, end) or (keeps_empty and a == b and start <= a < end):
            yield max(a, start) - start, min(b, end) - start


def columns_of(segments: Sequence[MarkedText]) -> dict[str, pl.Series]:
    """The ranges of segments as columns of a corpus part, in bytes."""
    rows: dict[str, list[Any]] = {"control_spans": [], "assistant_spans": [], "messages": []}
    for segment in segments:
        place = segment.byte_offsets()
        for name in ("control_spans", "assistant_spans"):
            rows[name].append([{"start": place(start), "end": place(end)} for start, end in getattr(segment, name)])
        rows["messages"].append([each._replace(start=place(each.start), end=place(each.end))._asdict() for each in segment.messages])
    types = {"control_spans": _SPANS, "assistant_spans": _SPANS, "messages": _MESSAGES}
    return {name: pl.Series(name, values, dtype=types[name]) for name, values in rows.items()}


def segments_of(table: pl.DataFrame) -> list[MarkedText]:
    """The segments of a corpus part with conversations."""
    names = ("text", "control_spans", "assistant_spans", "messages")
    return [_segment(*row) for row in table.select(names).iter_rows()]


def _segment(text: str, controls: list[Any], assistant: list[Any], messages: list[Any]) -> MarkedText:
    place: Callable[[int], int] = int
    if not text.isascii():
        ends = np.cumsum([0, *(len(character.encode()) for character in text)])
        place = lambda offset: int(np.searchsorted(ends, offset))  # noqa: E731
    return MarkedText(
        text=text,
        control_spans=tuple((place(span["start"]), place(span["end"])) for span in controls),
        assistant_spans=tuple((place(span["start"]), place(span["end"])) for span in assistant),
        messages=tuple(MessageSpan(each["role"], place(each["start"]), place(each["end"]), each["is_whole"]) for each in messages),
    )
