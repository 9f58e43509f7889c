"""The position map `dtw`: dynamic time warping over the token strings (FuseLLM, arXiv 2401.10491, section 3.2, and its released code).

The cost of matching two tokens is the Levenshtein distance of their spellings without the word-start mark. The cheapest monotonic path
matches every token of each side with at least one of the other. If paths cost the same, then, going back from the end, a step on both
sides is preferred, then one on the source's side, then one on the target's. Spellings are the tokenizers' own: a byte-level tokenizer
writes `âĢĶ` for `—` of a SentencePiece tokenizer.

A target position is *aligned* if the matched tokens agree (FuseChat, arXiv 2408.07990, section 3.1, on groups):

    em          exactly one source token is matched, and the spellings are equal
    mined       as em, or the vocabulary map maps the source token to the target token
    fusechat    as mined, or one of the two is matched with an exclusive group of the other's tokens, and ends with the spelling of the
                group's last token, whose distribution is then used

Positions rise, but unlike those of `span` they may repeat, and the prefixes of a pair may end at different bytes: in a run of equal tokens
the path may be off by some. A leading bos is matched with the other's bos, not by its spelling; if the other has no bos it is unaligned.

Time is quadratic in the length of a segment. Memory is bounded, because the path is traced back in blocks of rows.

Axes: T positions of a part, S segments, V source vocabulary, W target vocabulary, N different strings, C characters of all of them.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ..store.tokenizer import Tokenizer
from .edit_distance import PackedStrings, distance_to, forget_pattern, note_pattern
from .positions import UNALIGNED

Match = Literal["em", "mined", "fusechat"]
_MOVES_BYTES = 1 << 26  # of the steps that are stored to trace the path back
_COSTS_BYTES = 1 << 26  # of the cached distances between a segment's different tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Spellings:
    """The tokens of two vocabularies as comparable strings."""

    strings: PackedStrings
    bare_V: NDArray[np.int32]  # the string of each source token without word-start marks
    bare_W: NDArray[np.int32]
    spelling_V: NDArray[np.int32]  # equal to that of a target token if the two have the same spelling, ignoring the kind of word-start mark
    spelling_W: NDArray[np.int32]
    marked_spelling_V: NDArray[np.int32]  # the same with a word-start mark added if there is none
    marked_id_V: NDArray[np.int32]  # the source token with that spelling; -1 for none
    starts_word_W: NDArray[np.bool_]

    @classmethod
    def of_tokenizers(cls, source: Tokenizer, *, target: Tokenizer) -> Self:
        """The spellings of two tokenizers' vocabularies."""
        return cls.of_pieces(
            source.pieces, target_pieces=target.pieces, source_word_start=source.word_start, target_word_start=target.word_start
        )

    @classmethod
    def of_pieces(cls, source_pieces: list[str], *, target_pieces: list[str], source_word_start: str, target_word_start: str) -> Self:
        """The same for lists of pieces, by id; the marks represent a space before a word."""
        numbers: dict[str, int] = {}
        bare = [
            [numbers.setdefault(piece.replace(mark, ""), len(numbers)) for piece in pieces]
            for pieces, mark in ((source_pieces, source_word_start), (target_pieces, target_word_start))
        ]
        respelled = [piece.replace(source_word_start, target_word_start) for piece in source_pieces]
        marked = [piece if piece.startswith(target_word_start) else target_word_start + piece for piece in respelled]
        spellings: dict[str, int] = {}
        spelling_V, marked_V, spelling_W = (
            np.array([spellings.setdefault(piece, len(spellings)) for piece in pieces], np.int32)
            for pieces in (respelled, marked, target_pieces)
        )
        ids = {piece: token_id for token_id, piece in enumerate(respelled)}
        return cls(
            strings=PackedStrings.pack(list(numbers))[0],
            bare_V=np.array(bare[0], np.int32),
            bare_W=np.array(bare[1], np.int32),
            spelling_V=spelling_V,
            spelling_W=spelling_W,
            marked_spelling_V=marked_V,
            marked_id_V=np.array([ids.get(piece, -1) for piece in marked], np.int32),
            starts_word_W=np.array([piece.startswith(target_word_start) for piece in target_pieces], np.bool_),
        )


class _Text(NamedTuple):
    """A side's segments, for the compiled code."""

    tokens_T: Any  # strings in `_warp`, ids in `_agree`
    offsets: Any
    text_starts_S: Any


class _Strings(NamedTuple):
    """Packed strings, for the compiled code."""

    chars_C: Any
    offsets_N1: Any
    marks_N: Any


class _Spelled(NamedTuple):
    """Both vocabularies as `Spellings` has them, for the compiled code."""

    spelling_V: Any
    spelling_W: Any
    marked_spelling_V: Any
    marked_id_V: Any
    starts_word_W: Any
    bare_V: Any
    bare_W: Any


class _Numbered(NamedTuple):
    """A segment as different strings, in order of appearance, and the index of each position's string."""

    strings: Any
    slots_T: Any


class _Room(NamedTuple):
    """What is computed again where it does not fit, in bytes."""

    moves: int
    costs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One model's tokens of a part."""

    token_ids_T: NDArray[Any]
    offsets: NDArray[np.int64]  # segment s is token_ids_T[offsets[s] : offsets[s + 1]]
    bos_id: int | None  # the bos at the start of segments; None if there is none

    @property
    def text_starts_S(self) -> NDArray[np.int64]:
        """Where each segment's text begins, after its bos."""
        starts_S = self.offsets[:-1].copy()
        if self.bos_id is not None and len(self.token_ids_T):
            first_S = self.token_ids_T[np.minimum(starts_S, len(self.token_ids_T) - 1)]
            starts_S += (first_S == self.bos_id) & (np.diff(self.offsets) > 0)
        return starts_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Matches:
    """The matched tokens: for each target position a run of source positions, from the first to the last."""

    first_T: NDArray[np.int32]  # indices in the source's part; -1 if there is no match
    last_T: NDArray[np.int32]
    cost_S: NDArray[np.int64]  # of the segment's path, in characters; 0 if there is none

    def pairs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Every matched pair of a source position and a target position, by target position."""
        matched_T = np.flatnonzero(self.first_T >= 0)
        first_T = self.first_T[matched_T].astype(np.int64)
        n_T = self.last_T[matched_T] - first_T + 1
        source = np.repeat(first_T - (np.cumsum(n_T) - n_T), n_T) + np.arange(n_T.sum())
        return source, np.repeat(matched_T, n_T)


def warp(source: Side, *, target: Side, source_segment_of_S: NDArray[np.int64], spellings: Spellings) -> Matches:
    """Find the cheapest path through each segment of a part.

    Args:
        source: the source's tokens.
        target: the target's.
        source_segment_of_S: for each target segment its index in the source's part, or -1 (`match_segments`).
        spellings: of both vocabularies.
    """
    first_T, last_T = np.full((2, len(target.token_ids_T)), UNALIGNED, np.int32)
    cost_S = np.zeros(len(source_segment_of_S), np.int64)
    strings = spellings.strings
    texts = [
        _Text(bare[side.token_ids_T], side.offsets, side.text_starts_S)
        for side, bare in ((source, spellings.bare_V), (target, spellings.bare_W))
    ]
    masks_A = np.zeros(strings.n_chars, np.uint64)
    packed, room = _Strings(strings.chars_C, strings.offsets_N1, strings.marks_N), _Room(_MOVES_BYTES, _COSTS_BYTES)
    _warp(texts[0], texts[1], source_segment_of_S, packed, masks_A, room, first_T, last_T, cost_S)
    return Matches(first_T=first_T, last_T=last_T, cost_S=cost_S)


def agreeing_positions(
    matches: Matches, *, source: Side, target: Side, spellings: Spellings, match: Match, target_ids_V: NDArray[np.int32] | None = None
) -> NDArray[np.int32]:
    """The position map: the matched positions whose tokens agree.

    For the first token of a segment's text, the source's token is compared with a word-start mark if the target's has one: that mark is the
    dummy prefix of the target's tokenizer.

    Args:
        matches: the result of `warp`.
        source: the source's tokens.
        target: the target's.
        spellings: of both vocabularies.
        match: what counts as agreeing.
        target_ids_V: the vocabulary map, -1 where unmapped; not used by `em`.

    Returns:
        For each target position the index of its source position in the source's part, int32; -1 if there is none.
    """
    position_T = np.full(len(target.token_ids_T), UNALIGNED, np.int32)
    if match == "em" or target_ids_V is None:
        target_ids_V = np.full(len(spellings.bare_V), -1, np.int32)
    texts = [_Text(side.token_ids_T, side.offsets, side.text_starts_S) for side in (source, target)]
    spelled = _Spelled(**{name: getattr(spellings, name) for name in _Spelled._fields})
    strings = _Strings(spellings.strings.chars_C, spellings.strings.offsets_N1, spellings.strings.marks_N)
    _agree(matches.first_T, matches.last_T, texts[0], texts[1], spelled, strings, target_ids_V, match == "fusechat", position_T)
    return position_T


@njit(cache=True, nogil=True)
def _warp(
    source: _Text, target: _Text, source_segment_of_S: Any, packed: _Strings, masks_A: Any, room: _Room, first_T: Any, last_T: Any,
    cost_S: Any,
) -> None:  # fmt: skip
    slot_N = np.full(len(packed.marks_N), -1, np.int32)  # numbers a segment's different strings
    for s in range(len(source_segment_of_S)):
        of_source = source_segment_of_S[s]
        if of_source < 0:
            continue
        source_start, target_start = source.text_starts_S[of_source], target.text_starts_S[s]
        if source_start > source.offsets[of_source] and target_start > target.offsets[s]:
            first_T[target.offsets[s]] = last_T[target.offsets[s]] = source.offsets[of_source]  # both segments begin with bos
        read = _numbered(source.tokens_T[source_start : source.offsets[of_source + 1]], slot_N)
        wanted = _numbered(target.tokens_T[target_start : target.offsets[s + 1]], slot_N)
        if len(read.slots_T) == 0 or len(wanted.slots_T) == 0:
            continue
        cost_S[s] = _path(read, wanted, packed, masks_A, room, source_start, first_T[target_start:], last_T[target_start:])


@njit(cache=True, nogil=True)
def _numbered(strings_T: Any, slot_N: Any) -> Any:
    """The different strings of a sequence, in order of appearance, and the index of each position's string."""
    strings, slots_T = np.empty(len(strings_T), np.int32), np.empty(len(strings_T), np.int32)
    n = 0
    for t in range(len(strings_T)):
        if slot_N[strings_T[t]] < 0:
            slot_N[strings_T[t]], strings[n] = n, strings_T[t]
            n += 1
        slots_T[t] = slot_N[strings_T[t]]
    for slot in range(n):
        slot_N[strings[slot]] = -1
    return _Numbered(strings[:n], slots_T)


@njit(cache=True, nogil=True)
def _costs(string: int, targets: Any, packed: _Strings, masks_A: Any, costs: Any) -> None:
    """The distance of a string to each of several strings."""
    chars_C, offsets_N1, marks_N = packed
    pattern_C = chars_C[offsets_N1[string] : offsets_N1[string + 1]]
    note_pattern(masks_A, pattern_C)
    for slot in range(len(targets)):
        other = targets[slot]
        length = offsets_N1[other + 1] - offsets_N1[other]
        if marks_N[string] & marks_N[other] == 0:  # no common character: every character changes
            costs[slot] = max(len(pattern_C), length)
        else:
            costs[slot] = distance_to(masks_A, pattern_C, chars_C[offsets_N1[other] : offsets_N1[other + 1]])
    forget_pattern(masks_A, pattern_C)


@njit(cache=True, nogil=True)
def _path(
    source: _Numbered, target: _Numbered, packed: _Strings, masks_A: Any, room: _Room, source_start: int, first_T: Any, last_T: Any
) -> int:
    """The cheapest path through one segment: write the run of source positions of each target position, return the cost."""
    n, m, m_strings = len(source.slots_T), len(target.slots_T), len(target.strings)
    # Distances of the strings that appear first are cached, as many as fit; the others are computed again in each row.
    n_kept = min(len(source.strings), max(1, room.costs // (4 * m_strings)))
    kept, passing = np.empty((n_kept, m_strings), np.int32), np.empty(m_strings, np.int32)
    for slot in range(n_kept):
        _costs(source.strings[slot], target.strings, packed, masks_A, kept[slot])
    block = min(n, max(1, room.moves // m))
    moves = np.empty((block, m), np.uint8)
    n_blocks = (n + block - 1) // block
    before_blocks = np.empty((n_blocks, m), np.int32)  # the row before each block, to compute the block's moves again
    row = np.zeros(m, np.int32)
    for b in range(n_blocks):
        before_blocks[b] = row
        for i in range(b * block, min(n, (b + 1) * block)):
            slot = source.slots_T[i]
            if slot >= n_kept:
                _costs(source.strings[slot], target.strings, packed, masks_A, passing)
            _row(kept[slot] if slot < n_kept else passing, target.slots_T, i == 0, row, moves[i - b * block])
    cost = row[m - 1]
    i, j, held = n - 1, m - 1, n_blocks - 1
    last_T[j] = source_start + i
    while i > 0 or j > 0:
        b = i // block
        if b != held:
            row[:] = before_blocks[b]
            for again in range(b * block, (b + 1) * block):
                slot = source.slots_T[again]
                if slot >= n_kept:
                    _costs(source.strings[slot], target.strings, packed, masks_A, passing)
                _row(kept[slot] if slot < n_kept else passing, target.slots_T, again == 0, row, moves[again - b * block])
            held = b
        move = moves[i - b * block, j]
        if move != 1:  # a step on the target's side
            first_T[j] = source_start + i
            j -= 1
        if move != 2:  # a step on the source's side
            i -= 1
        if move != 1:
            last_T[j] = source_start + i
    first_T[0] = source_start
    return cost


@njit(cache=True, nogil=True)
def _row(costs: Any, target_slots: Any, is_first: bool, row: Any, moves: Any) -> None:
    """One row of the dynamic programme, in place. Moves: 0 is a step on both sides, 1 on the source's, 2 on the target's."""
    if is_first:
        row[0] = costs[target_slots[0]]
        for j in range(1, len(row)):
            row[j] = row[j - 1] + costs[target_slots[j]]
            moves[j] = 2
        return
    diagonal = row[0]
    row[0] += costs[target_slots[0]]
    left = row[0]
    moves[0] = 1
    for j in range(1, len(row)):
        up = row[j]
        best, move = diagonal, 0
        if up < best:
            best, move = up, 1
        if left < best:
            best, move = left, 2
        diagonal = up
        left = best + costs[target_slots[j]]
        row[j], moves[j] = left, move


@njit(cache=True, nogil=True)
def _agree(
    first_T: Any, last_T: Any, source: _Text, target: _Text, spelled: _Spelled, strings: _Strings, target_ids_V: Any, with_groups: bool,
    position_T: Any,
) -> None:  # fmt: skip
    for s in range(len(target.text_starts_S)):
        for t in range(target.offsets[s], target.offsets[s + 1]):
            first, last = first_T[t], last_T[t]
            if first < 0:
                continue
            target_id, source_id = target.tokens_T[t], source.tokens_T[last]
            if t < target.text_starts_S[s]:
                position_T[t] = last  # bos
            elif first == last:
                spelling = spelled.spelling_V[source_id]
                if t == target.text_starts_S[s] and spelled.starts_word_W[target_id] and spelling != spelled.marked_spelling_V[source_id]:
                    spelling, mapped_id = spelled.marked_spelling_V[source_id], spelled.marked_id_V[source_id]
                else:
                    mapped_id = source_id
                mapped = target_ids_V[mapped_id] if mapped_id >= 0 else -1
                agrees = spelling == spelled.spelling_W[target_id] or mapped == target_id
                if not agrees and with_groups and _ends_group(first_T, t):
                    agrees = _ends_with(spelled.bare_V[source_id], spelled.bare_W[target_id], strings.chars_C, strings.offsets_N1)
                if agrees:
                    position_T[t] = last
            elif with_groups and _ends_with(spelled.bare_W[target_id], spelled.bare_V[source_id], strings.chars_C, strings.offsets_N1):
                position_T[t] = last


@njit(cache=True, nogil=True)
def _ends_group(first_T: Any, t: int) -> bool:
    """Whether the position is the last of several that are matched with the same source position.

    Groups never overlap: where the path could turn from a run on one side into a run on the other, a step on both sides costs no more and
    is preferred.
    """
    starts = t == 0 or first_T[t - 1] != first_T[t]
    goes_on = t + 1 < len(first_T) and first_T[t + 1] == first_T[t]
    return not starts and not goes_on


@njit(cache=True, nogil=True)
def _ends_with(whole: int, ending: int, chars_C: Any, offsets_N1: Any) -> bool:
    """Whether a string ends with another string that is not empty."""
    length = offsets_N1[ending + 1] - offsets_N1[ending]
    if length == 0 or length > offsets_N1[whole + 1] - offsets_N1[whole]:
        return False
    shift = offsets_N1[whole + 1] - offsets_N1[ending + 1]
    place = offsets_N1[ending]
    while place < offsets_N1[ending + 1] and chars_C[place] == chars_C[place + shift]:
        place += 1
    return place == offsets_N1[ending + 1]
