"""Levenshtein distances between the strings of two vocabularies, and the nearest string in one for each string of the other.

The distance is bit-parallel (Myers 1999, in the form of Hyyrö 2003): one column of the dynamic programme is one word of 64 bits, so a
string of up to 64 characters needs a few operations per character of the other. Longer strings use the textbook algorithm.

The search is exact, and skips most strings without comparing them: the distance is at least the difference of the lengths, and at least
the number of characters that only one of the two has (benchmarks/align.py).

Axes: N strings, C characters of all of them, one after another.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ..store.machine import usable_cores

_WORD = 64  # characters of a string in one machine word
_QUERIES = 512  # per task of a thread


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedStrings:
    """Strings as arrays that compiled code can read."""

    chars_C: NDArray[np.int32]  # characters, numbered from 0 by `alphabet`
    offsets_N1: NDArray[np.int64]  # string n is chars_C[offsets_N1[n] : offsets_N1[n + 1]]
    marks_N: NDArray[np.uint64]  # one of 64 bits is set for each character of the string
    n_chars: int  # size of the alphabet

    @classmethod
    def pack(cls, *lists: Sequence[str]) -> list[Self]:
        """Pack lists of strings with one alphabet, so that they can be compared."""
        # Lone surrogates represent bytes that are not a character; `surrogatepass` keeps them.
        codes = [np.frombuffer("".join(strings).encode("utf-32-le", "surrogatepass"), np.uint32) for strings in lists]
        alphabet = np.unique(np.concatenate(codes))
        packed = []
        for strings, code_C in zip(lists, codes, strict=True):
            lengths_N = np.fromiter(map(len, strings), np.int64, len(strings))
            offsets_N1 = np.concatenate([[0], np.cumsum(lengths_N)])
            chars_C = np.searchsorted(alphabet, code_C).astype(np.int32)
            marks_N = np.zeros(len(strings), np.uint64)
            np.bitwise_or.at(marks_N, np.repeat(np.arange(len(strings)), lengths_N), np.uint64(1) << (chars_C % _WORD).astype(np.uint64))
            packed.append(cls(chars_C=chars_C, offsets_N1=offsets_N1, marks_N=marks_N, n_chars=len(alphabet)))
        return packed

    def __len__(self) -> int:
        return len(self.marks_N)


def nearest(queries: Sequence[str], *, candidates: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The candidate with the smallest Levenshtein distance to each query; on ties, the first.

    Returns:
        The index of the candidate [N], -1 if there are no candidates, and its distance in characters [N].
    """
    query, candidate = PackedStrings.pack(queries, candidates)
    order_N = np.argsort(np.diff(candidate.offsets_N1), kind="stable")  # by length
    sorted_candidate = _reordered(candidate, order_N)
    lengths_N = np.diff(sorted_candidate.offsets_N1)
    starts_L = np.searchsorted(lengths_N, np.arange(int(lengths_N.max(initial=0)) + 2))  # the first string of each length
    index_N, distance_N = np.full(len(query), -1, np.int64), np.zeros(len(query), np.int32)

    def search(first: int) -> None:
        _nearest(
            query.chars_C, query.offsets_N1, query.marks_N, sorted_candidate.chars_C, sorted_candidate.offsets_N1,
            sorted_candidate.marks_N, order_N, starts_L, query.n_chars, first, min(first + _QUERIES, len(query)), index_N, distance_N,
        )  # fmt: skip

    with ThreadPoolExecutor(usable_cores()) as threads:  # compiled code that releases the interpreter's lock
        list(threads.map(search, range(0, len(query), _QUERIES)))
    return index_N, distance_N


def distances(left: Sequence[str], right: Sequence[str]) -> NDArray[np.int32]:
    """The Levenshtein distance of each pair of strings, in characters."""
    packed_left, packed_right = PackedStrings.pack(left, right)
    distance_N = np.zeros(len(left), np.int32)
    _distances(packed_left.chars_C, packed_left.offsets_N1, packed_right.chars_C, packed_right.offsets_N1, packed_left.n_chars, distance_N)
    return distance_N


def _reordered(packed: PackedStrings, order_N: NDArray[np.int64]) -> PackedStrings:
    lengths_N = np.diff(packed.offsets_N1)[order_N]
    offsets_N1 = np.concatenate([[0], np.cumsum(lengths_N)])
    shift_N = packed.offsets_N1[:-1][order_N] - offsets_N1[:-1]
    chars_C = packed.chars_C[np.repeat(shift_N, lengths_N) + np.arange(len(packed.chars_C))]
    return PackedStrings(chars_C=chars_C, offsets_N1=offsets_N1, marks_N=packed.marks_N[order_N], n_chars=packed.n_chars)


@njit(cache=True, nogil=True)
def note_pattern(masks_A: Any, pattern_C: Any) -> None:
    """Write, for each character of the alphabet, a mask of its places in the pattern."""
    for place in range(min(len(pattern_C), _WORD)):
        masks_A[pattern_C[place]] |= np.uint64(1) << np.uint64(place)


@njit(cache=True, nogil=True)
def forget_pattern(masks_A: Any, pattern_C: Any) -> None:
    """Clear what `note_pattern` wrote."""
    for char in pattern_C:
        masks_A[char] = 0


@njit(cache=True, nogil=True)
def distance_to(masks_A: Any, pattern_C: Any, other_C: Any) -> int:
    """Levenshtein distance of a pattern, whose masks are written, to another string."""
    if len(pattern_C) > _WORD:
        return _textbook(pattern_C, other_C)
    if len(pattern_C) == 0:
        return len(other_C)
    one = np.uint64(1)
    last = one << np.uint64(len(pattern_C) - 1)
    rises, falls = ~np.uint64(0), np.uint64(0)  # where the column rises and falls by one from a place to the next
    distance = len(pattern_C)
    for char in other_C:
        equal = masks_A[char]
        vertical = equal | falls
        horizontal = (((equal & rises) + rises) ^ rises) | equal
        up, down = falls | ~(horizontal | rises), rises & horizontal
        if up & last:
            distance += 1
        elif down & last:
            distance -= 1
        up, down = (up << one) | one, down << one
        rises, falls = down | ~(vertical | up), up & vertical
    return distance


@njit(cache=True, nogil=True)
def _textbook(left_C: Any, right_C: Any) -> int:
    row = np.arange(len(right_C) + 1)
    for i in range(len(left_C)):
        diagonal, row[0] = row[0], i + 1
        for j in range(len(right_C)):
            changed = diagonal + (left_C[i] != right_C[j])
            diagonal = row[j + 1]
            row[j + 1] = min(changed, row[j] + 1, row[j + 1] + 1)
    return row[-1]


@njit(cache=True, nogil=True)
def _distances(left_C: Any, left_N1: Any, right_C: Any, right_N1: Any, n_chars: int, distance_N: Any) -> None:
    masks_A = np.zeros(n_chars, np.uint64)
    for n in range(len(distance_N)):
        pattern_C = left_C[left_N1[n] : left_N1[n + 1]]
        note_pattern(masks_A, pattern_C)
        distance_N[n] = distance_to(masks_A, pattern_C, right_C[right_N1[n] : right_N1[n + 1]])
        forget_pattern(masks_A, pattern_C)


@njit(cache=True, nogil=True, inline="always")
def _n_bits(word: Any) -> Any:
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (word * np.uint64(0x0101010101010101)) >> np.uint64(56)


@njit(cache=True, nogil=True)
def _nearest(
    query_C: Any, query_N1: Any, query_marks_N: Any, other_C: Any, other_N1: Any, other_marks_N: Any, order_N: Any, starts_L: Any,
    n_chars: int, first: int, stop: int, index_N: Any, distance_N: Any,
) -> None:  # fmt: skip
    masks_A = np.zeros(n_chars, np.uint64)
    longest = len(starts_L) - 2
    for n in range(first, stop):
        pattern_C = query_C[query_N1[n] : query_N1[n + 1]]
        note_pattern(masks_A, pattern_C)
        best, best_index = 2**31, -1
        gap = 0
        # By rising difference of the lengths, a lower bound of the distance; a tie may still be earlier in the list.
        while gap <= best and (len(pattern_C) - gap >= 0 or len(pattern_C) + gap <= longest):
            for side in range(2 if gap else 1):
                length = len(pattern_C) - gap if side == 0 else len(pattern_C) + gap
                if length < 0 or length > longest:
                    continue
                for place in range(starts_L[length], starts_L[length + 1]):
                    mine, its = query_marks_N[n], other_marks_N[place]
                    bound = int(max(_n_bits(mine & ~its), _n_bits(its & ~mine)))
                    if bound > best or (bound == best and order_N[place] > best_index):
                        continue
                    distance = distance_to(masks_A, pattern_C, other_C[other_N1[place] : other_N1[place + 1]])
                    if distance < best or (distance == best and order_N[place] < best_index):
                        best, best_index = distance, order_N[place]
            gap += 1
        forget_pattern(masks_A, pattern_C)
        if best_index >= 0:
            index_N[n], distance_N[n] = best_index, best
