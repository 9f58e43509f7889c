"""AdamW and its learning rate, as functions of the training settings."""

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .config import TrainingConfig
from .megatron import DistributedDataParallel, MegatronOptimizer, OptimizerConfig, OptimizerParamScheduler, get_megatron_optimizer
from .runtime import Runtime


def make_optimizer(model: DistributedDataParallel, *, config: TrainingConfig, runtime: Runtime) -> MegatronOptimizer:
    """AdamW over a rank's shard, with float32 masters if the weights are bfloat16."""
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
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(settings, [model], use_gloo_process_groups=False)
    _start_state(optimizer)
    for shard in optimizer.chained_optimizers:
        shard.data_parallel_group_gloo = runtime.host_data_group  # for checkpoints
        shard.get_parameter_state_dp_zero = partial(_with_padding, shard, shard.get_parameter_state_dp_zero)
    return optimizer


def _with_padding(shard: Any, collect: Callable[..., dict[Any, Any] | None], **how: Any) -> dict[Any, Any] | None:
    """The state of a rank's buffers for a checkpoint, with each bucket at its offset with padding.

    Gradients are cut into padded buckets. Megatron-core 0.16.1 omits the padding between them when it collects the state, but then looks
    for each parameter at its offset with padding: from the second bucket on, a checkpoint would hold the wrong numbers.
    """
    state = collect(**how)
    for number, of_buffer in enumerate(shard.gbuf_ranges if state is not None else ()):
        buffer = shard.buffers[number]
        for dtype in of_buffer:
            assert state is not None
            tensors = state[number][dtype]
            for key in [key for key, value in tensors.items() if isinstance(value, Tensor)]:
                tensors[key] = _padded(tensors[key], sizes=[(bucket.grad_data.numel(), bucket.numel_unpadded) for bucket in buffer.buckets])
    return state


def _padded(values_N: Tensor, *, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Insert padding into contiguous values: each bucket has a capacity, and holds a number of the next values."""
    padded_N = values_N.new_zeros(sum(room for room, _ in sizes))
    start = place = 0
    for room, held in sizes:
        padded_N[place : place + held] = values_N[start : start + held]
        start, place = start + held, place + room
    return padded_N


def _start_state(optimizer: MegatronOptimizer) -> None:
    """Give torch's AdamW its state before its first step, because Megatron-core loads a state only into an existing one."""
    for adam in (shard.optimizer for shard in optimizer.chained_optimizers):
        if isinstance(adam, torch.optim.AdamW):  # those of Transformer Engine and apex do not need it
            for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                adam.state[parameter] = {"step": torch.zeros((), dtype=torch.float32), **moments}


def load_state(optimizer: MegatronOptimizer, *, state: dict[str, Any], step: int) -> None:
    """Load an optimizer's state from a checkpoint after `step` steps.

    For torch's AdamW, Megatron-core stores the number of steps once. On loading, it looks for it among each parameter's moments, and all
    parameters would share one tensor, which each of them would then increment.
    """
    with contextlib.ExitStack() as stack:
        for shard in optimizer.chained_optimizers:
            put = shard._set_main_param_and_optimizer_states
            shard._set_main_param_and_optimizer_states = partial(_put_with_step, put)
            stack.callback(setattr, shard, "_set_main_param_and_optimizer_states", put)
        optimizer.load_state_dict(state)
    for adam in (shard.optimizer for shard in optimizer.chained_optimizers):
        if isinstance(adam, torch.optim.AdamW):
            for moments in adam.state.values():
                moments["step"] = torch.tensor(float(step), dtype=torch.float32)


def _put_with_step(put: Callable[..., None], model_parameter: Tensor, tensors: dict[str, Tensor]) -> None:
    put(model_parameter, {"step": torch.zeros(())} | tensors)


def make_scheduler(optimizer: MegatronOptimizer, *, config: TrainingConfig, steps: int) -> OptimizerParamScheduler:
    """Linear warm-up, then a cosine that ends one step after the last. It is stepped before each update, so no update has rate 0."""
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
