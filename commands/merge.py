"""`fuseline merge`: merge models of one architecture in parameter space."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..store.errors import UsageError
from .console import show_table
from .options import models_option
from .terminal import say

if TYPE_CHECKING:  # a command imports what it needs when it runs, so that --help is fast
    from ..ingest.models import ModelFolder
    from ..train.merging.merge import MergeReport
    from .merge_request import MergeRequest


@click.command("merge")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--output", "-o", type=click.Path(file_okay=False, path_type=Path), required=True, help="New folder for the merged model.")
@models_option
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def merge_command(file: Path, output: Path, models_dir: Path, as_json: bool) -> None:
    """Merge models of one architecture into one, in parameter space.

    FILE is TOML, or mergekit's YAML (.yaml, .yml). It names the models, as folders relative to it or by their ids on the Hugging Face hub,
    and the method: linear, slerp, task_arithmetic, ties, dare_linear, dare_ties, varm, sce. docs/merging.md has the formulas.

    Memory use does not grow with the size of the models. The folder appears only when it is complete.

    Example:  fuseline merge merge.toml -o models/merged
    """
    from .merge_file import load_merge_file

    request = load_merge_file(file)
    base, models = _found(request, folder_of_file=file.parent, models_dir=models_dir)

    from ..train.merging.identity import REPORT, merge_identity, merged_before
    from ..train.model_folder import tokenizer_files_digest

    digests = {name: model.weights_digest for name, model in models.items()}
    identity = merge_identity(request.config, base=base.weights_digest if base else None, models=digests)
    named = models[request.tokenizer] if request.tokenizer else base or models[min(models)]
    identity |= {"tokenizer": tokenizer_files_digest(named.folder)}
    if merged_before(output, identity=identity):
        stored = json.loads((output / REPORT).read_text(encoding="utf-8"))
        _show_nothing_to_do(output, stored, as_json=as_json)
        return
    if output.exists():
        raise UsageError(f"--output ({output}) must be a new folder: it exists and is not the output of this merge.")
    report = _merge(request, base=base, models=models, output=output, identity=identity)
    _show(report, as_json=as_json)


def _found(request: "MergeRequest", *, folder_of_file: Path, models_dir: Path) -> "tuple[ModelFolder | None, dict[str, ModelFolder]]":
    """Find and check the models' folders."""
    from ..ingest.models import find_model, require_different_folders

    def find(config: Any) -> "ModelFolder":
        return find_model(config, models_dir=models_dir, base=folder_of_file)

    base = find(request.base) if request.base else None
    models = {config.name: find(config) for config in request.models}
    require_different_folders(([base] if base else []) + list(models.values()))
    for name, model in models.items():
        layers = model.hf_config.get("num_hidden_layers")
        if request.n_layers is not None and layers != request.n_layers:
            raise UsageError(
                f"slices: layer_range ([0, {request.n_layers}]) must be all layers of {name} ({layers}): only whole models can be merged."
            )
    return base, models


def _merge(
    request: "MergeRequest",
    *,
    base: "ModelFolder | None",
    models: "dict[str, ModelFolder]",
    output: Path,
    identity: Mapping[str, Any],
) -> "MergeReport":
    from ..pipeline.progress import Progress
    from ..train.merging.merge import merge

    progress = Progress()
    lineage = {"base": base.origin if base else None, "models": {name: model.origin for name, model in sorted(models.items())}}
    with progress.writing(f"merge {output.name}") as follow:
        report = merge(
            request.config,
            base=base.folder if base else None,
            models={name: model.folder for name, model in models.items()},
            output=output,
            identity=identity,
            lineage=lineage,
            tokenizer_of=models[request.tokenizer].folder if request.tokenizer else None,
            on_progress=follow,
        )
    for warning in report.warnings:
        progress.say(f"Warning: {warning}.")
    return report


def _show(report: "MergeReport", *, as_json: bool) -> None:
    from ..pipeline.progress import size

    if as_json:
        moved = [tensor.moved for tensor in report.tensors]
        record = {
            "output": str(report.output),
            "done": "merged",
            "bytes": report.n_bytes,
            "tensors": len(moved),
            "warnings": report.warnings,
        }
        say(json.dumps(record | {"groups": _groups(report)}, indent=1))
        return
    groups = _groups(report)
    names = sorted({name for group in groups for name in group["weights"]})
    rows = [
        [
            group["group"],
            f"{group['tensors']:,}",
            f"{group['parameters']:,}",
            "" if group["moved"] is None else f"{group['moved']:.1%}",
            *(f"{group['weights'][name]:.3f}" if name in group["weights"] else "" for name in names),
        ]
        for group in groups
    ]
    show_table(["tensors", "number", "parameters", "moved", *names], rows)
    say(f"{report.output}: {size(report.n_bytes)} of weights. merge_report.json has the weights of each tensor.")


def _show_nothing_to_do(output: Path, stored: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        record = {"output": str(output), "done": "nothing to do", "tensors": len(stored["tensors"]), "warnings": stored["warnings"]}
        say(json.dumps(record, indent=1))
    else:
        say(f"{output} already has this merge: nothing to do.")


def _groups(report: "MergeReport") -> list[dict[str, Any]]:
    """Rows that group the tensors of the same kind over all layers; weights and shares are means over their parameters."""
    groups: dict[str, list[Any]] = {}
    for tensor in report.tensors:
        inside = re.search(r"\.\d+\.([^.]+)", tensor.name)
        groups.setdefault(inside.group(1) if inside else tensor.name.removesuffix(".weight"), []).append(tensor)
    rows = []
    for group, tensors in groups.items():
        sizes = [math.prod(tensor.shape) for tensor in tensors]
        total = max(1, sum(sizes))
        names = sorted({name for tensor in tensors for name in tensor.weights})
        moved = [tensor.moved for tensor in tensors]
        rows.append(
            {
                "group": group,
                "tensors": len(tensors),
                "parameters": sum(sizes),
                "moved": None if None in moved else sum(share * n for share, n in zip(moved, sizes, strict=True)) / total,
                "weights": {
                    name: sum(tensor.weights.get(name, 0.0) * n for tensor, n in zip(tensors, sizes, strict=True)) / total for name in names
                },
            }
        )
    return rows
