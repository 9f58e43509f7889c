"""Detects a figure of a step that is much larger than in the steps before."""

from collections import deque
from collections.abc import Iterable
from statistics import median

WINDOW = 100  # steps for the median
_LEAST = 10  # steps before the first warning: the first norms are large in every run
# Times the median. In a healthy run, norms stay within twice their median, and losses within a tenth of it.
SPIKES = {"loss": 1.5, "grad_norm": 5.0}


class Watch:
    """One figure in the last steps. After a resume it is built from the earlier records, with the same result."""

    def __init__(self, spike: float, *, before: Iterable[float] = ()) -> None:
        self._spike = spike
        self._values = deque(before, maxlen=WINDOW)

    def ratio(self, value: float) -> float | None:
        """Add a step's value; return its ratio to the median of the steps before, if it is a spike."""
        usual = median(self._values) if len(self._values) >= _LEAST else 0.0
        self._values.append(value)
        return value / usual if usual > 0 and value > self._spike * usual else None
