"""Everything that the trainer uses from Megatron-core, imported only here and from one exact version.

Its imports warn about optional CUDA packages, and about its own use of `torch.jit`.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import torch

from ..store.errors import FuselineError

VERSION = "0.16.1"


@contextlib.contextmanager
def _compiled_when_called() -> Iterator[None]:
    """Have `torch.compile` load its compiler when a function that it decorates is called first, which on processors none is.

    Megatron-core decorates functions as it is imported: each rank took 8.5 s of processor time to start, and takes 6.0 s with this.
    """
    compile_now = torch.compile

    def compile_later(function: Callable[..., Any] | None = None, **settings: Any) -> Callable[..., Any]:
        if function is None:
            return functools.partial(compile_later, **settings)
        compiled = functools.cache(lambda: compile_now(function, **settings))
        return functools.wraps(function)(lambda *arguments, **named: compiled()(*arguments, **named))

    torch.compile = compile_later  # type: ignore[assignment]  # it has overloads
    try:
        yield
    finally:
        torch.compile = compile_now


with warnings.catch_warnings(action="ignore"), _compiled_when_called():
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

__all__ = [
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "GPTModel",
    "MegatronModule",
    "MegatronOptimizer",
    "ModuleSpec",
    "OptimizerConfig",
    "OptimizerParamScheduler",
    "PackedSeqParams",
    "TorchDistSaveShardedStrategy",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "TransformerLayer",
    "TransformerLayerSubmodules",
    "dist_checkpointing",
    "filesystem_async",
    "finalize_model_grads",
    "get_gpt_layer_local_spec",
    "get_megatron_optimizer",
    "parallel_state",
    "random",
    "require_version",
    "tensor_parallel",
]


def require_version() -> None:
    """Raise FuselineError unless the installed Megatron-core has the exact version whose names this package replaces and extends."""
    installed = metadata.version("megatron-core")
    if installed != VERSION:
        raise FuselineError(f"megatron-core ({installed}) must be {VERSION}: run pip install 'megatron-core=={VERSION}'.")
