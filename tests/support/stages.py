"""Stages with troubles of their own, for workers of any kind: they are imported by name in other processes."""

import os
import signal
import time
from pathlib import Path

import polars as pl
from fuseline.store.dataset import Dataset, PartContent


class TroubledStage:
    """Each part is a small table. Some raise, some kill the process that computes them, for as long as a file is there."""

    def __init__(self, dataset: Dataset, *, raising: set[int], killing: set[int], while_there: Path) -> None:
        self.dataset, self.raising, self.killing, self.while_there = dataset, raising, killing, while_there

    def compute(self, part: int) -> PartContent:
        if self.while_there.exists():
            if part in self.raising:
                raise ValueError(f"part {part} is not to my liking")
            if part in self.killing:
                os.kill(os.getpid(), signal.SIGKILL)
        print("漢")  # as a model's own code may
        time.sleep(0.01)
        return PartContent(data=pl.DataFrame({"part": [part]}), counts={"documents": 1})
