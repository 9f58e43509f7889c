"""One training of the pipeline: looked over, started, followed, and taken note of."""

from typing import Any

from ..store.workspace import Workspace
from ..train.config import TrainJob
from ..train.launch import launch
from .progress import Progress, size


def describe(job: TrainJob) -> str:
    """What a training takes, after the checks that it can go well.

    Raises:
        FuselineError: it cannot; see `train.preflight`.
    """
    from ..train.preflight import preflight  # loads transformers

    cost, config = preflight(job), job.config
    return (
        f"training {config.name}: {cost.parameters / 1e6:,.1f}M parameters, TP {config.tensor_parallel} × DP {config.data_parallel}, "
        f"about {size(cost.rank_bytes)} a rank, checkpoints of {size(cost.checkpoint_bytes)}"
    )


def train(job: TrainJob, *, workspace: Workspace, progress: Progress) -> None:
    """Train to the end, from the newest checkpoint if there is one, with a run in the workspace and a line of progress."""
    name = job.config.name
    progress.say(describe(job))
    with (
        workspace.run("train", name=name, parameters=job.config.model_dump()) as run,
        progress.stage(f"training {name}", total=1.0) as tracker,
    ):
        is_first = True

        def follow(record: dict[str, Any]) -> None:
            nonlocal is_first
            if record["warning"] is not None:
                progress.say(f"training {name}: {record['warning']}")
            tracker(1 / record["steps"], figures(record), earlier=(record["step"] - 1) / record["steps"] if is_first else 0.0)
            is_first = False
            run.metrics.update(step=record["step"], loss=record["loss"])

        launch(job, on_metrics=follow)


def figures(record: dict[str, Any]) -> str:
    """A step's record in one line."""
    terms = "" if record["fusion_loss"] is None else f" (text {record['clm_loss']:.4f}, fused {record['fusion_loss']:.4f})"
    seconds = record["tokens"] / record["tokens_per_second"]
    found = [
        f"step {record['step']}/{record['steps']}",
        f"loss {record['loss']:.4f}{terms}",
        f"learning rate {record['learning_rate']:.2e}",
        f"{record['tokens_per_second']:,.0f} tokens/s",
    ]
    if record["mfu"] is not None:
        found.append(f"MFU {record['mfu']:.0%}")
    found.append(f"data wait {record['data_wait_seconds'] / seconds:.0%}")
    if record["held_out_bpb"] is not None:
        found.append(f"held out {record['held_out_bpb']:.4f} bits per byte")
    return ", ".join(found)
