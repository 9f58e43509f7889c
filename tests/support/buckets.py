"""A rank that saves or loads a checkpoint of a model whose gradients are cut into many buckets, as those of models of real size are.

    python buckets.py RUN_FOLDER save|load

Before it is saved the state is made a function of the weights; once loaded, it must be that of the weights that are there.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from fuseline.train.config import TrainJob
from fuseline.train.runtime import Runtime, open_runtime
from fuseline.train.trainer import Trainer

BUCKET = 5_000  # parameters; Megatron-core takes 40 million


def main(run_folder: Path, mode: str) -> None:
    job = TrainJob.load(run_folder)
    settings = Runtime.gradient_settings.fget
    Runtime.gradient_settings = property(lambda runtime: dataclasses.replace(settings(runtime), bucket_size=BUCKET))
    with open_runtime(job.config, choose_arithmetic=lambda: job.config.dtype) as runtime:
        trainer = Trainer(job, runtime=runtime)
        (shard,) = trainer.optimizer.chained_optimizers
        buckets = [bucket for buffer in shard.buffers for bucket in buffer.buckets]
        assert len(buckets) > 5, len(buckets)
        assert any(bucket.grad_data.numel() > bucket.numel_unpadded for bucket in buckets[:-1]), "there is padding between buckets"
        masters = [parameter for group in shard.shard_fp32_from_float16_groups for parameter in group]
        weights = [parameter for group in shard.shard_float16_groups for parameter in group]
        assert len(masters) > 3
        if mode == "save":
            for master in masters:
                state = shard.optimizer.state[master]
                state["exp_avg"].copy_(master / 2)
                state["exp_avg_sq"].copy_(master.square())
            trainer.checkpoints.save(1, keep=1)
            return
        for master in masters:
            master.data.fill_(7)
        assert trainer.checkpoints.resume() == 1
        for master, weight in zip(masters, weights, strict=True):
            state = shard.optimizer.state[master]
            assert torch.equal(master, weight.float()), weight.shape
            assert torch.equal(state["exp_avg"], master / 2)
            assert torch.equal(state["exp_avg_sq"], master.square())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
