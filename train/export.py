"""Writes the trained model as a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` loads.

The weights keep the dtype they were trained in (`TrainingConfig.dtype`), so what is written is bit for bit what was trained.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from ..store import durable
from .architecture import Architecture
from .config import TrainJob
from .convert import rule_of
from .runtime import Runtime

SHARD_BYTES = 5_000_000_000  # a larger model is split into files of at most this size
_COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def export(model: nn.Module, *, job: TrainJob, architecture: Architecture, runtime: Runtime, facts: dict[str, Any]) -> None:
    """Gather the model tensor by tensor onto rank 0 and publish it as `job.export_folder`. Every rank must call it.

    Args:
        model: this rank's shard, a FusionModel.
        job: names the folders and the lineage.
        architecture: of the model.
        runtime: the process groups.
        facts: results of the run for the model card: steps, losses.
    """
    folder = job.export_folder
    temporary = folder.with_name(f"{durable.TEMPORARY}new-{folder.name}")  # always the same: the next export clears what a crash left
    if runtime.leads:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    if runtime.data_rank == 0:
        tensors = gathered(model, architecture=architecture, runtime=runtime)
        if runtime.leads:
            _write_weights(tensors, folder=temporary)
        else:
            for _ in tensors:
                pass  # takes part in gathering
    if runtime.leads:
        _write_config(job, folder=temporary)
        for name in _COPIED:
            if (job.model_folder / name).exists():
                shutil.copyfile(job.model_folder / name, temporary / name)
        (temporary / "README.md").write_text(_model_card(job, facts=facts), encoding="utf-8")
        durable.publish(temporary, to=folder)
    dist.barrier()


def gathered(model: nn.Module, *, architecture: Architecture, runtime: Runtime) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors under their Hugging Face names, on the CPU of the group's first rank; the other ranks get nothing but must iterate."""
    group, ranks = runtime.tensor_group, runtime.tensor_parallel
    for name, parameter in model.named_parameters():
        shard = parameter.detach().contiguous()
        shards = [torch.empty_like(shard) for _ in range(ranks)] if runtime.tensor_rank == 0 else None
        dist.gather(shard, shards, group=group, group_dst=0)
        if shards is not None:
            layout, hf_names = rule_of(name)
            for hf_name, tensor in zip(hf_names, layout.join(shards, architecture), strict=True):
                yield hf_name, tensor.cpu().contiguous()


def _write_weights(tensors: Iterator[tuple[str, Tensor]], *, folder: Path) -> None:
    files: list[list[str]] = []
    n_bytes = total = 0
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(shard, folder / f"shard-{len(files)}", metadata={"format": "pt"})
        (folder / f"shard-{len(files)}").chmod(0o644)  # safetensors lets nobody else read what it writes
        files.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and n_bytes + tensor.nbytes > SHARD_BYTES:
            flush()
            n_bytes = 0
        shard[name] = tensor
        n_bytes += tensor.nbytes
        total += tensor.nbytes
    flush()
    n_files = len(files)
    names = ["model.safetensors"] if n_files == 1 else [f"model-{i:05d}-of-{n_files:05d}.safetensors" for i in range(1, n_files + 1)]
    for i, name in enumerate(names):
        (folder / f"shard-{i}").rename(folder / name)
    if len(files) > 1:
        weight_map = {tensor: name for name, contents in zip(names, files, strict=True) for tensor in contents}
        durable.write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_config(job: TrainJob, *, folder: Path) -> None:
    config = json.loads((job.model_folder / "config.json").read_text(encoding="utf-8"))
    for key in ("_name_or_path", "torch_dtype"):  # the second is the old name of dtype
        config.pop(key, None)
    durable.write_json(folder / "config.json", config | {"dtype": job.config.dtype})


def _model_card(job: TrainJob, *, facts: dict[str, Any]) -> str:
    settings = job.config.model_dump(mode="json", exclude_none=True)
    sections = {"Lineage": job.lineage, "Training": facts, "Settings": settings}
    written = {title: json.dumps(content, indent=2, ensure_ascii=False) for title, content in sections.items()}
    body = "\n".join(f"## {title}\n\n```json\n{text}\n```\n" for title, text in written.items())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [fuseline, knowledge-fusion]\n---\n\n"
        f"# {job.config.name}\n\n"
        f"Trained by fuseline on the fused next-token distributions of several models; started from `{job.model_folder.name}`.\n"
        f"Weights are {job.config.dtype}, as they were trained.\n\n{body}"
    )
