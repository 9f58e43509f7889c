"""Text that a tokenizer rewrites without changing what is read: where in the text each byte of the rewritten one lies.

Two rewritings count as reading the text: composition (NFC; Qwen's and GPT-NeoX's tokenizers read é for e and an accent that combines), and
`▁` for a space (SentencePiece writes spaces so). What else a normaliser changes, such as NFKC or runs of spaces, is a loss.
"""

import unicodedata
from collections.abc import Iterator

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
            return _places(text, read, clusters=((index, index + 1) for index in range(len(read))), n_bytes=len(rewritten))
        if unicodedata.normalize("NFC", read).encode() == rewritten:
            return _places(text, read, clusters=_clusters(read), n_bytes=len(rewritten))
    return None


def _places(text: str, read: str, *, clusters: Iterator[tuple[int, int]], n_bytes: int) -> NDArray[np.int64] | None:
    places, in_text = [np.zeros(1, np.int64)], 0
    for start, end in clusters:
        original, composed = text[start:end], unicodedata.normalize("NFC", read[start:end])
        size = len(composed.encode())
        in_text += len(original.encode())
        places.append(in_text - size + 1 + np.arange(size) if composed == original else np.full(size, in_text))
    found = np.concatenate(places)
    return found if len(found) == n_bytes + 1 else None


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
