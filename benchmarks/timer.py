"""The one clock of the benchmarks."""

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(slots=True)
class Took:
    """What some work took."""

    wall: float = 0.0  # seconds
    processor: float = 0.0  # seconds of all threads of this process

    @property
    def computing(self) -> float:
        """Seconds of the wall with a GPU, else of the processor, which other processes do not lengthen."""
        return self.wall if _has_gpu() else self.processor


@contextlib.contextmanager
def timer() -> Iterator[Took]:
    """Measure a block; with a GPU until it has done what it was given."""
    took = Took()
    _wait()
    wall, processor = time.perf_counter(), _processor()
    yield took
    _wait()
    took.wall, took.processor = time.perf_counter() - wall, _processor() - processor


def timed(work: Callable[[], object]) -> Took:
    """Measure a call."""
    with timer() as took:
        work()
    return took


def _processor() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _has_gpu() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available()


def _wait() -> None:
    if _has_gpu():
        sys.modules["torch"].cuda.synchronize()
