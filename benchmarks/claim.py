"""Does fusion teach more than the text alone? Trainings on targets of a workspace, each evaluated by domain while it runs.

    python benchmarks/claim.py WORKSPACE TARGETS MODEL_FOLDER --seeds 0 1 2 --set clm_weight=0.1 epochs=5 --set clm_weight=1.0 epochs=5

Each `--set` is a training, run with every seed; its values are TOML, its keys those of `[training]`. The held-out text is that of the
workspace's evaluation of the target (`fuseline eval`, or a training with `evaluate_every`). For each training and seed a line of JSON comes
out: the settings, and the bits per byte of each domain after so many steps, of which step 0 is the start.
"""

import argparse
import json
import tempfile
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

from fuseline.store.dataset import Dataset
from fuseline.store.trainings import read_evaluations, read_metrics
from fuseline.store.workspace import Workspace
from fuseline.train.config import HeldOut, TrainingConfig, TrainJob
from fuseline.train.launch import launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("targets", help="name of the fused targets")
    parser.add_argument("model", type=Path, help="folder of the model to start from")
    parser.add_argument("--parts", type=int, help="train on the first so many parts; all, if not given")
    parser.add_argument("--set", dest="settings", nargs="+", action="append", required=True, metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--evaluations", type=int, default=4, help="in a training, besides the start")
    arguments = parser.parse_args()
    workspace = Workspace.open(arguments.workspace.absolute())
    for seed in arguments.seeds:
        for settings in arguments.settings:
            given = tomllib.loads("\n".join(settings)) | {"seed": seed}
            print(json.dumps(trained(given, workspace=workspace, arguments=arguments)), flush=True)


def trained(settings: dict[str, Any], *, workspace: Workspace, arguments: argparse.Namespace) -> dict[str, Any]:
    """What one training came to."""
    targets = Dataset.open(workspace.folder("targets", arguments.targets))
    parts = targets.parts()[: arguments.parts]
    found = [dataset for dataset in workspace.datasets() if dataset.kind == "evaluations" and is_start(dataset, arguments.model)]
    if len(found) != 1:
        raise SystemExit(f"{workspace.root} must have one evaluation of {arguments.model.name}, and has {len(found)}: run fuseline eval.")
    held_out = found[0]
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(**{"checkpoint_every": 10**9, "keep_checkpoints": 1} | settings)
        n_tokens = sum(targets.manifest(part).counts["tokens"] for part in parts)
        steps = config.steps or n_tokens * (config.epochs or 1) // (config.global_batch_size * config.sequence_length)
        job = TrainJob(
            run_folder=Path(folder) / "run",
            model_folder=arguments.model.absolute(),
            model_fingerprint="",
            targets_folder=targets.folder,
            targets_fingerprint=targets.fingerprint,
            tokens_fingerprint="",
            parts=parts,
            corpus_folder=workspace.folder("corpus", held_out.description["corpus"]),
            held_out=HeldOut(folder=held_out.folder, parts=held_out.parts()),
            export_folder=Path(folder) / "run" / "export",
            lineage={},
            config=config.model_copy(update={"evaluate_every": max(1, round(steps / arguments.evaluations))}),
        )
        launch(job, on_metrics=lambda record: None)
        bits: dict[int, dict[str, float]] = defaultdict(dict)
        for record in read_evaluations(job.run_folder):
            bits[record["step"]][record["domain"]] = round(record["bpb"], 5)
        tokens = sum(record["tokens"] for record in read_metrics(job.run_folder))
    return {"settings": settings, "targets": arguments.targets, "parts": len(parts), "unique": n_tokens, "tokens": tokens, "bpb": bits}


def is_start(dataset: Dataset, model: Path) -> bool:
    """Whether an evaluation is that of the model to start from."""
    return Path(dataset.description["source"]).name == model.name


if __name__ == "__main__":
    main()
