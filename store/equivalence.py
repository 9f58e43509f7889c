"""Text that a tokenizer rewrites without loss: the position in the original text of each byte of the rewritten text.

Two rewritings count as lossless: composition (NFC; Qwen's and GPT-NeoX's tokenizers read é for e with a combining accent), and `▁` for a
space (as SentencePiece writes spaces). Any other change by a normaliser, such as NFKC or merged runs of spaces, is a loss.
"""

import unicodedata
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

WORD_START = "▁"  # how SentencePiece writes a space inside a token


def places_in_text(text: str, *, rewritten: bytes) -> NDArray[np.int64] | None:
    """Where the prefixes of an equivalent text end in the original text, in bytes of UTF-8.

    Args:
        text: the text.
        rewritten: the equivalent text, in UTF-8.

    Returns:
        For each number of bytes from 0 to the equivalent's length, how many bytes of the text these represent. Inside a composed
        character it is the end of that character. None if the two are not equivalent.
    """
    for as_space in (False, True):
        read = text.replace(WORD_START, " ") if as_space else text
        if read.encode() == rewritten:
            return _places(zip(text, read, strict=True))
        if unicodedata.normalize("NFC", read).encode() == rewritten:
            places = _places((text[start:end], unicodedata.normalize("NFC", read[start:end])) for start, end in _clusters(read))
            return places if len(places) == len(rewritten) + 1 else None
    return None


def _places(pieces: Iterable[tuple[str, str]]) -> NDArray[np.int64]:
    """`pieces` are pairs: a piece of the text, and its rewritten form."""
    places, at = [np.zeros(1, np.int64)], 0
    for original, found in pieces:
        size = len(found.encode())
        at += len(original.encode())
        places.append(at - size + 1 + np.arange(size) if found == original else np.full(size, at))
    return np.concatenate(places)


def _clusters(text: str) -> Iterator[tuple[int, int]]:
    """Pieces of a text, each of which is composed independently."""
    start = 0
    for index in range(1, len(text) + 1):
        if index == len(text) or _starts_cluster(text[start:index], text[index]):
            yield start, index
            start = index


def _starts_cluster(cluster: str, char: str) -> bool:
    """Whether a character does not combine with the text before it."""
    if unicodedata.combining(char):
        return False
    return unicodedata.normalize("NFC", cluster + char) == unicodedata.normalize("NFC", cluster) + unicodedata.normalize("NFC", char)
