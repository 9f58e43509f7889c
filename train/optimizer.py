"""AdamW and its learning rate, as functions of the training settings."""

import math

import torch

from .config import TrainingConfig
from .megatron import DistributedDataParallel, MegatronOptimizer, OptimizerConfig, OptimizerParamScheduler, get_megatron_optimizer
from .runtime import Runtime


def make_optimizer(model: DistributedDataParallel, *, config: TrainingConfig, runtime: Runtime) -> MegatronOptimizer:
    """AdamW over a rank's shard, with float32 masters where the weights are bfloat16."""
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.learning_rate,
        min_lr=config.learning_rate * config.min_learning_rate_ratio,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.gradient_clip,
        bf16=runtime.dtype == torch.bfloat16,
        params_dtype=runtime.dtype,
        # Its state cannot be loaded from a checkpoint without Transformer Engine or apex.
        use_distributed_optimizer=False,
    )
    return get_megatron_optimizer(settings, [model], use_gloo_process_groups=False)


def make_scheduler(optimizer: MegatronOptimizer, *, config: TrainingConfig, steps: int) -> OptimizerParamScheduler:
    """Linear warm-up, then a cosine that reaches its end one step after the last; stepped before each update, so none has a rate of 0."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.learning_rate,
        min_lr=config.learning_rate * config.min_learning_rate_ratio,
        lr_warmup_steps=math.ceil(steps * config.warmup_fraction),
        lr_decay_steps=steps + 1,
        lr_decay_style="cosine",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
