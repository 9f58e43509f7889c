"""Cuts documents into segments that fit every model's context, without losing a byte."""

import re
from collections.abc import Sequence

from ..store.tokenizer import Tokenizer

# Preferred places for a cut, best first: after a blank line, after a line, after white space.
_BOUNDARIES = tuple(re.compile(pattern) for pattern in (r"\n[ \t\r]*\n\s*", r"\n", r"\s+"))
_CHARS_PER_TOKEN = 6  # more than in prose, so that the first window usually holds a whole segment


def segment_documents(texts: Sequence[str], *, tokenizers: Sequence[Tokenizer], context_length: int) -> list[list[str]]:
    """Cut each document into segments of at most `context_length` tokens, a leading bos included, for each tokenizer.

    Concatenating a document's segments gives the document. A cut is made after a paragraph, else a line, else white space, in the second
    half of the text that fits; else between two characters.
    """
    fits = [True] * len(texts)
    for tokenizer in tokenizers:
        budget = _budget(tokenizer, context_length)
        fits = [ok and len(ids) <= budget for ok, ids in zip(fits, tokenizer.encode(texts), strict=True)]
    return [
        [text] if ok else _segment(text, tokenizers=tokenizers, context_length=context_length) for text, ok in zip(texts, fits, strict=True)
    ]


def _budget(tokenizer: Tokenizer, context_length: int) -> int:
    return context_length - tokenizer.prepends_bos


def _segment(text: str, *, tokenizers: Sequence[Tokenizer], context_length: int) -> list[str]:
    segments = []
    start, window = 0, context_length * _CHARS_PER_TOKEN
    while start < len(text):
        piece = text[start : start + window]
        segment = piece if start + len(piece) == len(text) else shortened(piece)
        # A segment tokenized alone may have more tokens than inside the window, so it is measured again after the cut.
        while (fitting := _fitting_chars(segment, tokenizers=tokenizers, context_length=context_length)) < len(segment):
            segment = shortened(segment[:fitting])
        segments.append(segment)
        start += len(segment)
        # Dense scripts have less than a character per token: do not tokenize much more text than is used.
        window = 2 * len(segment) if len(segment) < len(piece) // 2 else context_length * _CHARS_PER_TOKEN
    return segments


def _fitting_chars(text: str, *, tokenizers: Sequence[Tokenizer], context_length: int) -> int:
    """Length of the longest prefix within every tokenizer's budget, by the tokens of the whole text; at least 1."""
    longest = len(text)
    for tokenizer in tokenizers:
        budget = _budget(tokenizer, context_length)
        encoding = tokenizer.backend.encode(text, add_special_tokens=False)
        if len(encoding.ids) > budget:
            # The first token outside the budget starts here. Several byte tokens of one character share their offsets.
            longest = min(longest, encoding.offsets[budget][0])
    return max(longest, 1)


def shortened(text: str) -> str:
    """A text up to the best place for a cut in its second half; the whole text if there is none."""
    for boundary in _BOUNDARIES:
        ends = [match.end() for match in boundary.finditer(text, len(text) // 2)]
        if ends and ends[-1] > len(text) // 2:
            return text[: ends[-1]]
    return text
