"""Maps the tokens of a model's own rendering of a conversation to the shared text.

Inside the assistant's messages, both texts have the same bytes. Elsewhere they differ, and only the beginnings and ends of turns
correspond.
"""

import numpy as np
from numpy.typing import NDArray

from .marked_text import MarkedText, Span


def placed(ends_T: NDArray[np.int64], *, own: MarkedText, shared: MarkedText) -> NDArray[np.int64]:
    """The byte of the shared text up to which a model has read at the end of each of its tokens.

    A token that ends between two such places counts as ending at the next one. If several tokens end at one place, the last one counts
    there (`align.positions`): it is the one that has just ended a turn, or is about to begin one.

    Args:
        ends_T: the byte of its own rendering at which each token ends.
        own: the model's rendering.
        shared: the corpus's; with the same turns of the assistant (`turns`).
    """
    points: list[tuple[int, int, bool]] = []  # own byte, shared byte, whether a message's text ends there
    own_place, shared_place = own.byte_offsets(), shared.byte_offsets()
    for (own_turn, own_message), (turn, message) in zip(turns(own), turns(shared), strict=True):
        skipped = shared.text[message[0] : message[1]].find(own.text[own_message[0] : own_message[1]])  # a template may trim the text
        start = message[0] + max(skipped, 0)
        points += [(own_place(own_turn[0]), shared_place(turn[0]), False), (own_place(own_message[0]), shared_place(start), False)]
        points += [(own_place(own_message[1]), shared_place(start + own_message[1] - own_message[0]), True)]
        points += [(own_place(own_turn[1]), shared_place(turn[1]), False)]
    points.append((own_place(len(own.text)), shared_place(len(shared.text)), False))
    own_P, shared_P, is_text_P = (np.array(column) for column in zip(*points, strict=True))
    point_T = np.searchsorted(own_P, ends_T, side="left")
    return shared_P[point_T] - np.where(is_text_P[point_T], own_P[point_T] - ends_T, 0)


def turns(segment: MarkedText) -> list[tuple[Span, Span]]:
    """The assistant's turns, each with its message."""
    messages = [(each.start, each.end) for each in segment.messages if each.role == "assistant"]
    return list(zip(segment.assistant_spans, messages, strict=True))


def has_whole_turns(segment: MarkedText) -> bool:
    """Whether all messages and all turns of the assistant end inside the segment."""
    messages = [each for each in segment.messages if each.role == "assistant"]
    return (
        all(each.is_whole for each in segment.messages)
        and len(messages) == len(segment.assistant_spans)
        and all(a <= each.start and each.end <= b for each, (a, b) in zip(messages, segment.assistant_spans, strict=True))
    )
