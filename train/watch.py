"""Notices a gradient whose norm stands out from those of the steps before."""

from collections import deque
from collections.abc import Iterable
from statistics import median

WINDOW = 100  # steps whose median is what is usual
_LEAST = 20  # steps before which nothing is usual yet: the first are large in any run
SPIKE = 5.0  # times the median; while nothing is wrong the norms of a run scatter within twice their median


class GradientWatch:
    """The norms of the last steps. Made anew from the records of the steps before, it goes on as if it had seen them itself."""

    def __init__(self, norms: Iterable[float] = ()) -> None:
        self._norms = deque(norms, maxlen=WINDOW)

    def ratio(self, norm: float) -> float | None:
        """Take note of a step's norm; returns how many times the median of the steps before it is, if that makes it a spike."""
        usual = median(self._norms) if len(self._norms) >= _LEAST else None
        self._norms.append(norm)
        return norm / usual if usual and norm > SPIKE * usual else None
