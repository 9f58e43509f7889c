"""Text that a tokenizer rewrites without changing what is read: where in the text each byte of the rewritten one lies.

Two rewritings count as reading the text: composition (NFC; Qwen's and GPT-NeoX's tokenizers read é for e and an accent that combines), and
`▁` for a space (SentencePiece writes spaces so). What else a normaliser changes, such as NFKC or runs of spaces, is a loss.
"""

import unicodedata
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

WORD_START = "▁"  # how SentencePiece writes a space inside a token


def places_in_text(text: str, *, rewritten: bytes) -> NDArray[np.int64] | None:
    """Where in a text, in bytes of UTF-8, the prefixes of an equivalent one end.

    Args:
        text: the text.
        rewritten: its equivalent, in UTF-8.

    Returns:
        For each number of bytes from 0 to the equivalent's length how many bytes of the text these stand for. Inside of a character that
        was composed it is the end of that character. None if the two are not equivalent.
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
    """`pieces` are those of the text and what became of them."""
    places, at = [np.zeros(1, np.int64)], 0
    for original, found in pieces:
        size = len(found.encode())
        at += len(original.encode())
        places.append(at - size + 1 + np.arange(size) if found == original else np.full(size, at))
    return np.concatenate(places)


def _clusters(text: str) -> Iterator[tuple[int, int]]:
    """Pieces of a text that are composed each on its own."""
    start = 0
    for index in range(1, len(text) + 1):
        if index == len(text) or _starts_anew(text[start:index], text[index]):
            yield start, index
            start = index


def _starts_anew(cluster: str, char: str) -> bool:
    """Whether a character does not combine with what comes before it."""
    if unicodedata.combining(char):
        return False
    return unicodedata.normalize("NFC", cluster + char) == unicodedata.normalize("NFC", cluster) + unicodedata.normalize("NFC", char)
