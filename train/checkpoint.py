"""Checkpoints of a run: weights and optimizer state by Megatron-core's `dist_checkpointing`, the step, and the number format of the
arithmetic.

The order of the data and the learning rate are functions of the step, so no other state is needed. Shards are stored by their position in
the whole model, so a different number of tensor- or data-parallel ranks can load them. A checkpoint is written to a temporary folder,
fsynced and renamed, so every visible checkpoint is complete.
"""

import queue
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from ..store import durable
from ..store.errors import DamagedPart, FingerprintMismatch
from ..store.trainings import checkpoint_damage, checkpoint_folder, seal_checkpoint
from . import records
from .megatron import (
    DistributedDataParallel,
    MegatronOptimizer,
    TorchDistSaveShardedStrategy,
    dist_checkpointing,
    filesystem_async,
)
from .optimizer import load_state
from .runtime import Runtime

_VERSION = 3  # of the contents of a checkpoint, and of the order of the data


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self,
        run_folder: Path,
        *,
        identity: Mapping[str, Any],
        dtype: str,
        model: DistributedDataParallel,
        optimizer: MegatronOptimizer,
        runtime: Runtime,
    ) -> None:
        self.run_folder = run_folder
        self._identity, self._dtype = identity, dtype
        self._model = model
        self._optimizer = optimizer
        self._runtime = runtime

    def save(self, step: int, *, keep: int) -> None:
        """Save the state after `step` steps and remove all but the `keep` newest checkpoints. Every rank must call it."""
        folder = checkpoint_folder(self.run_folder, step=step)
        if folder.is_dir():
            return
        temporary = folder.with_name(durable.TEMPORARY + folder.name)  # all ranks use the same name
        if self._runtime.leads:
            temporary.mkdir(parents=True)
        dist.barrier()
        state = self._sharded_state(loading=False) | {"identity": dict(self._identity), "step": step, "version": _VERSION}
        dist_checkpointing.save(state, str(temporary), _InThisProcess("torch_dist", 1))
        if self._runtime.leads:  # not in the state: it is needed before the model is built
            records.write_machine(temporary, dtype=self._dtype, arithmetic=self._runtime.arithmetic)
        dist.barrier()
        seal_checkpoint(temporary, share=self._runtime.rank, shares=dist.get_world_size())
        dist.barrier()
        if self._runtime.leads:
            durable.publish(temporary, to=folder)
            self._point_at(folder)
            for old in records.checkpoint_steps(self.run_folder)[:-keep]:
                durable.remove(checkpoint_folder(self.run_folder, step=old))
        dist.barrier()

    def _point_at(self, folder: Path) -> None:
        """Replace the link `latest` beside the checkpoints atomically."""
        durable.publish_link(folder.with_name(records.LATEST), to=folder.name)

    def resume(self) -> int:
        """Load the newest checkpoint, remove files left by a crash, and return its step; 0 if there is none. Every rank must call it.

        Raises:
            FingerprintMismatch: the checkpoint belongs to a training with different settings or data.
            DamagedPart: it cannot be read.
        """
        if self._runtime.leads:
            durable.sweep(self.run_folder, alone=True)
            durable.sweep(self.run_folder / "checkpoints", alone=True)
        dist.barrier()
        step = records.last_checkpoint(self.run_folder)
        if step is None:
            return 0
        folder = checkpoint_folder(self.run_folder, step=step)
        if self._runtime.leads:
            self._point_at(folder)  # a newer one may have been removed by hand
        try:
            _require_undamaged(folder, full=False)  # before any of its files is opened
            stored = dist_checkpointing.load_common_state_dict(str(folder))
            records.require_identity(self.run_folder, stored=stored["identity"], asked=self._identity)
            _require_version(stored.get("version", 1), folder=folder)
            _require_undamaged(folder, share=self._runtime.rank, shares=dist.get_world_size())
            state = dist_checkpointing.load(self._sharded_state(loading=True), str(folder))
        except FingerprintMismatch:
            raise
        except (Exception, CheckpointException) as error:  # an invalid checkpoint can raise any exception
            remedy = "Remove it to continue from the previous one."
            raise DamagedPart(f"The checkpoint {folder} cannot be read ({_reason(error)}). {remedy}") from error
        self._model.module.load_state_dict(state["model"])
        load_state(self._optimizer, state=state["optimizer"], step=step)
        return step

    def _sharded_state(self, *, loading: bool) -> dict[str, Any]:
        # Without the group, Megatron-core warns for every parameter and looks it up itself.
        metadata = {
            "dp_cp_group": self._runtime.data_group,
            "distrib_optim_sharding_type": "fully_reshardable",
            # To write, only the first data-parallel rank collects the state, in the machine's memory. To read, each rank takes all of it.
            "distrib_optim_fully_reshardable_mem_efficient": True,
        }
        model = self._model.module.sharded_state_dict(metadata=metadata)
        return {"model": model, "optimizer": self._optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)}


def _require_undamaged(folder: Path, **how: Any) -> None:
    """Raise ValueError if `checkpoint_damage` finds any."""
    damage = checkpoint_damage(folder, **how)
    if damage is not None:
        raise ValueError(damage)


def _reason(error: BaseException) -> str:
    """The first line of an error's text; if several ranks failed, of one of them."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return (str(error).splitlines() or [type(error).__name__])[0]


def _require_version(version: int, *, folder: Path) -> None:
    if version != _VERSION:
        raise FingerprintMismatch(
            f"The checkpoint {folder} has version {version}, but this fuseline needs version {_VERSION}, because the order of the data or "
            f"the contents differ. Remove {folder.parents[1]} to restart the training."
        )


class _InThisProcess(TorchDistSaveShardedStrategy):
    """Writes a rank's shards in the rank's own process.

    Megatron-core writes them in a forked child and collects the results through a third process. After a SIGKILL that process would
    remain, and a fork is unsafe while another thread reads data.
    """

    def __init__(self, backend: str, version: int) -> None:
        super().__init__(backend, version, thread_count=1)
        filesystem_async._results_queue = queue.Queue()  # instead of the third process

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> Any:
        request = super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)
        return request if request.async_fn is None else request._replace(async_fn=partial(_write_buckets, [writer.transforms]))


def _write_buckets(transforms: list[Any], _: int, buckets: list[Any], results: "queue.Queue[Any]") -> None:
    outcomes, pending = queue.Queue[Any](), queue.Queue[Any]()
    for i, bucket in enumerate(buckets):
        pending.put(i)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(transforms, i, bucket, outcomes, pending, use_fsync=False)
    collected = dict(outcomes.get() for _ in buckets)
    failure = next((outcome for outcome in collected.values() if isinstance(outcome, Exception)), None)
    results.put(failure or collected)
