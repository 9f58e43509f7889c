"""Notices a figure of a step that stands out from those of the steps before."""

from collections import deque
from collections.abc import Iterable
from statistics import median

WINDOW = 100  # steps whose median is what is usual
_LEAST = 10  # steps before which nothing is usual yet: norms of the first are large in any run
# Times the median. While nothing is wrong, norms of a run scatter within twice their median, and losses within a tenth of it.
SPIKES = {"loss": 1.5, "grad_norm": 5.0}


class Watch:
    """One figure in the last steps. Made anew from the records of the steps before, it goes on as if it had seen them itself."""

    def __init__(self, spike: float, *, before: Iterable[float] = ()) -> None:
        self._spike = spike
        self._values = deque(before, maxlen=WINDOW)

    def ratio(self, value: float) -> float | None:
        """Take note of a step's value; returns how many times the median of the steps before it is, if that makes it a spike."""
        usual = median(self._values) if len(self._values) >= _LEAST else 0.0
        self._values.append(value)
        return value / usual if usual > 0 and value > self._spike * usual else None
