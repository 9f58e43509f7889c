"""The device layer of the trainer: CPU ranks over gloo or CUDA ranks over NCCL. No other module checks which.

Megatron-core has the literal `cuda` in its gradient buffers, optimizers and checkpoint loader. On CPU ranks a few names of Megatron-core
and torch are replaced while the runtime exists, so that a run without a GPU uses the same code as one with a GPU. The replaced names
belong to one exact version, which is checked.
"""

import contextlib
import os
import resource
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..store.errors import UsageError
from ..store.machine import use_threads
from .config import TrainingConfig
from .loss import CHUNK_ELEMENTS
from .meeting import MEETING
from .megatron import DistributedDataParallelConfig, parallel_state, random, require_version, tensor_parallel
from .unpickling import known_classes_only

_TIMEOUT = timedelta(minutes=30)  # for a message, which waits for the slowest rank

# Dense bfloat16 operations per second from the makers' data sheets, by a part of the GPU's name; the first match counts.
_PEAK_FLOPS = (
    ("B200", 2250e12), ("H200", 989e12), ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("GH200", 989e12), ("A100", 312e12),
    ("L40S", 362e12), ("A40", 150e12), ("A10", 125e12), ("L4", 121e12), ("V100", 125e12),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """One rank's device, computation dtype and process groups."""

    device: torch.device
    dtype: torch.dtype
    rank: int
    tensor_parallel: int
    tensor_rank: int
    sequence_parallel: bool
    data_parallel: int
    data_rank: int

    @property
    def arithmetic(self) -> str:
        """Name of the number format of parameters, activations and products."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def sequence_ranks(self) -> int:
        """Ranks that share the tokens of a micro-batch between the matrix products; their number must divide the tokens."""
        return self.tensor_parallel if self.sequence_parallel else 1

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        """Ranks that hold the shards of one copy of the model."""
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def data_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same shard and see different data."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    @property
    def host_data_group(self) -> dist.ProcessGroup:
        """The same ranks as `data_group`, for tensors in host memory."""
        return self.data_group if self.device.type == "cpu" else parallel_state.get_data_parallel_group_gloo(with_context_parallel=True)

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which writes the run's files."""
        return self.rank == 0

    @property
    def gradient_settings(self) -> DistributedDataParallelConfig:
        """Gradients are summed in float32 during the backward pass; each rank gets the share for its optimizer state.

        Overlapping also cuts the gradients into buckets. Without them a checkpoint would need a second full copy on the device.
        """
        return DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=True)

    @property
    def peak_flops(self) -> float | None:
        """The device's peak operations per second in the training's dtype; None if it is not known."""
        if self.device.type != "cuda" or self.dtype != torch.bfloat16:
            return None
        name = torch.cuda.get_device_name(self.device)
        return next((flops for part, flops in _PEAK_FLOPS if part in name), None)

    @property
    def free_memory(self) -> int:
        """Bytes that this rank may use: of its GPU, or its share of host memory."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    @property
    def pins_memory(self) -> bool:
        """Whether batches should be in pinned memory, so that the device can copy them while it computes."""
        return self.device.type == "cuda"

    def begin_thread(self) -> None:
        """Call this first in another thread that pins memory, because each thread has its own current GPU."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def moved(self, tensor: Tensor) -> Tensor:
        """A small tensor on the device; the copy does not wait for the device."""
        return (tensor.pin_memory() if self.pins_memory else tensor).to(self.device, non_blocking=True)

    @property
    def loss_chunk_elements(self) -> int:
        """Logits that the loss processes at a time: on a CPU what its caches hold; on a GPU few, large kernels (2 × 0.5 GB in float32)."""
        return CHUNK_ELEMENTS if self.device.type == "cpu" else 1 << 27

    @property
    def peak_memory(self) -> int:
        """Peak bytes of this rank so far: on its GPU, or of host memory."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @property
    def model_settings(self) -> Mapping[str, Any]:
        """Fields of Megatron-core's TransformerConfig that depend on the device.

        Its fused kernels need CUDA extensions, so they are off on both kinds of device.
        """
        return {
            "tensor_model_parallel_size": self.tensor_parallel,
            "sequence_parallel": self.sequence_parallel,
            "params_dtype": self.dtype,
            "bf16": self.dtype == torch.bfloat16,
            "use_cpu_initialization": self.device.type == "cpu",
            "gradient_accumulation_fusion": False,
            "bias_activation_fusion": False,
            "bias_dropout_fusion": False,
            "masked_softmax_fusion": False,
            "apply_rope_fusion": False,
            "persist_layer_norm": False,
            "cross_entropy_loss_fusion": False,
            "cuda_graph_scope": [],  # the default is deprecated
        }

    def has_flash_attention(self, head_dim: int) -> bool:
        """Whether one kernel, FlashAttention, can compute the attention of all packed segments for heads of `head_dim` channels."""
        if self.device.type != "cuda" or self.dtype != torch.bfloat16 or head_dim % 8 or head_dim > 256:
            return False
        return torch.cuda.get_device_capability(self.device) >= (8, 0)


@contextlib.contextmanager
def open_runtime(config: TrainingConfig, *, choose_arithmetic: Callable[[], str]) -> Iterator[Runtime]:
    """Join the process group that `Ranks` or `torchrun` set in the environment; leave it at the end.

    `choose_arithmetic` returns the number format of the computation; it is called on the first rank, for all ranks.

    Raises:
        UsageError: the number of ranks or of GPUs does not fit the configuration.
        FuselineError: the installed version of Megatron-core is not the one that this code is written for.
    """
    require_version()
    use_threads()
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if world_size != config.world_size:
        raise UsageError(
            f"tensor_parallel ({config.tensor_parallel}) × data_parallel ({config.data_parallel}) "
            f"must equal the number of ranks ({world_size})"
        )
    # Megatron-core overlaps its messages with its products by launch order, which needs a single queue.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    cuda = torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"The ranks on this machine ({os.environ.get('LOCAL_WORLD_SIZE', world_size)}) must not exceed its GPUs "
            f"({torch.cuda.device_count()}): lower --nproc-per-node, or tensor_parallel ({config.tensor_parallel}) × "
            f"data_parallel ({config.data_parallel})"
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=_meeting(world_size),
        rank=rank,
        world_size=world_size,
        timeout=_TIMEOUT,
        device_id=device if cuda else None,
    )
    try:
        with warnings.catch_warnings(), known_classes_only(), contextlib.nullcontext() if cuda else without_cuda():
            # Megatron-core calls torch's collectives by deprecated names.
            warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
            parallel_state.initialize_model_parallel(config.tensor_parallel, create_gloo_process_groups=cuda)
            torch.manual_seed(config.seed)
            arithmetic = [choose_arithmetic() if rank == 0 else ""]
            dist.broadcast_object_list(arithmetic, device=device)
            # Without dropout, no random numbers are drawn after initialisation; on CPU only the no-op tracker works.
            tensor_parallel.model_parallel_cuda_manual_seed(config.seed, inference_rng_tracker=not cuda, force_reset_rng=True)
            yield Runtime(
                device=device,
                dtype=getattr(torch, arithmetic[0]),
                rank=rank,
                tensor_parallel=config.tensor_parallel,
                tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
                sequence_parallel=config.sequence_parallel,
                data_parallel=config.data_parallel,
                data_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
            )
    except BaseException:
        if not cuda:  # NCCL may deadlock here with ranks that wait for this one; the process ends instead, and torchrun stops the others
            _leave()
        raise
    _leave()


def _meeting(world_size: int) -> dist.Store | None:
    """The ranks' rendezvous: the file of `Ranks`; None if `torchrun` sets it."""
    path = os.environ.get(MEETING)
    if path is None:
        return None
    store = dist.FileStore(path, world_size)
    store.set_timeout(_TIMEOUT)
    return store


def _leave() -> None:
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def cpu_replacements() -> list[tuple[Any, str, Callable[..., Any]]]:
    """(owner, name, replacement) of everything that is replaced on CPU ranks, besides device literals."""
    return [
        (torch.cuda, "current_device", lambda: "cpu"),
        (torch.cuda, "synchronize", lambda *_, **__: None),
        # Recomputing activations saves and restores the state of a CUDA generator, which does not exist here.
        (random, "_get_cuda_rng_state", lambda *_, **__: torch.empty(0, dtype=torch.uint8)),
        (random, "_set_cuda_rng_state", lambda *_, **__: None),
    ]


@contextlib.contextmanager
def without_cuda() -> Iterator[None]:
    """Make Megatron-core's `cuda` literals mean the CPU."""
    replaced = [(owner, name, getattr(owner, name)) for owner, name, _ in cpu_replacements()]
    try:
        for owner, name, stand_in in cpu_replacements():
            setattr(owner, name, stand_in)
        with _CudaMeansCpu():
            yield
    finally:
        for owner, name, original in replaced:
            setattr(owner, name, original)


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites `device="cuda"` arguments, `.cuda()`, and the type names by which Megatron-core sorts gradients."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)
