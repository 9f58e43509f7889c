"""Writes the trained model as a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` loads.

The weights have the dtype of the training (`TrainingConfig.dtype`), to which its forward passes round them in any arithmetic, so the
written weights are bit for bit the trained ones.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..store import durable
from .architecture import Architecture
from .config import TrainJob
from .convert import full_shapes, gathered
from .model_folder import copy_config, copy_tokenizer, write_model_card
from .runtime import Runtime
from .weight_files import write_weights


def export(model: nn.Module, *, job: TrainJob, architecture: Architecture, runtime: Runtime, facts: dict[str, Any]) -> None:
    """Gather the model tensor by tensor onto rank 0 and publish it as `job.export_folder`. Every rank must call it.

    Args:
        model: this rank's shard, a FusionModel.
        job: has the folders and the lineage.
        architecture: of the model.
        runtime: the process groups.
        facts: results of the run for the model card: steps, losses.
    """
    folder = job.export_folder
    temporary = folder.with_name(
        f"{durable.TEMPORARY}new-{folder.name}"
    )  # always the same, so that the next export removes files left by a crash
    if runtime.leads:
        durable.discard(temporary)
        temporary.mkdir(parents=True)
    if runtime.data_rank == 0:
        dtype = getattr(torch, job.config.dtype)
        tensors = ((name, tensor.to(dtype)) for name, tensor in gathered(model, architecture=architecture, runtime=runtime))
        if runtime.leads:
            shapes = full_shapes(model, architecture=architecture, ranks=runtime.tensor_parallel)
            write_weights(tensors, shapes=shapes, dtypes=dict.fromkeys(shapes, dtype), folder=temporary)
        else:
            for _ in tensors:
                pass  # every rank must take part in gathering
    if runtime.leads:
        copy_config(job.model_folder, to=temporary, dtype=job.config.dtype, is_tied=architecture.tied_embeddings)
        copy_tokenizer(job.model_folder, to=temporary, chat_template=job.chat_template)
        _write_card(job, facts=facts, folder=temporary)
        durable.publish(temporary, to=folder)
    dist.barrier()


def _write_card(job: TrainJob, *, facts: dict[str, Any], folder: Path) -> None:
    write_model_card(
        folder,
        name=job.config.name,
        text="Trained by fuseline on the fused next-token distributions of several models; started from "
        f"`{job.model_folder.name}`.\nWeights are {job.config.dtype}, as they were trained.",
        tags="fuseline, knowledge-fusion",
        sections={"Lineage": job.lineage, "Training": facts, "Settings": job.config.model_dump(mode="json", exclude_none=True)},
    )
