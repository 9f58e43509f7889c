"""Runs one training of the pipeline: checks, start, progress and record."""

import time
from collections.abc import Callable
from typing import Any

from ..store.workspace import Workspace
from ..train.config import TrainJob
from ..train.launch import launch
from ..train.records import figures
from .progress import Progress, size

FOLD_SECONDS = 60.0


def describe(job: TrainJob) -> str:
    """Check a training, and describe its cost and how it reads its data.

    Raises:
        FuselineError: it cannot be trained; see `train.preflight`.
    """
    from ..train.preflight import planned_reading, preflight  # loads transformers

    cost, reading, config = preflight(job), planned_reading(job), job.config
    lines = [
        f"training {config.name}: {cost.parameters / 1e6:,.1f}M parameters, TP {config.tensor_parallel} × DP {config.data_parallel}, "
        f"about {size(cost.rank_bytes)} a rank, checkpoints of {size(cost.checkpoint_bytes)}",
        *(f"training {config.name}: {remark}." for remark in reading.remarks()),
    ]
    return "\n".join(lines)


def train(job: TrainJob, *, workspace: Workspace, progress: Progress, fold: Callable[[], None]) -> None:
    """Train to the end, from the newest checkpoint if there is one. Record a run in the workspace, and show progress.

    `fold` updates the catalog. It is called regularly, so that queries see the progress.
    """
    name = job.config.name
    progress.say(describe(job))
    with (
        workspace.run("train", name=name, parameters=job.config.model_dump()) as run,
        progress.stage(f"training {name}", total=1.0) as tracker,
    ):
        folded = time.monotonic()
        is_first = True

        def follow(record: dict[str, Any]) -> None:
            nonlocal is_first, folded
            if record["warning"] is not None:
                progress.say(f"training {name}: {record['warning']}")
            done = 1 / record["steps"]
            # The first step counts as done earlier; otherwise the rate would include the start of the ranks.
            tracker(0.0 if is_first else done, figures(record), earlier=record["step"] * done if is_first else 0.0)
            is_first = False
            run.metrics.update(step=record["step"], loss=record["loss"])
            if time.monotonic() - folded > FOLD_SECONDS:
                fold()
                folded = time.monotonic()

        launch(job, on_metrics=follow)
