"""Writes the trained model as a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` loads.

The weights keep the dtype they were trained in (`TrainingConfig.dtype`), so what is written is bit for bit what was trained.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from ..store import durable
from .architecture import Architecture
from .config import TrainJob
from .convert import full_shapes, gathered
from .runtime import Runtime
from .weight_files import write_weights

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
            shapes = full_shapes(model, architecture=architecture, ranks=runtime.tensor_parallel)
            write_weights(tensors, shapes=shapes, dtype=runtime.dtype, folder=temporary)
            next(tensors, None)  # ends the generator
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
