"""A training step with fused targets against the same step without (clm_weight = 1), in one run, pair by pair.

    python benchmarks/train.py MODEL_FOLDER [--tokens-per-step 2048] [--steps 4] [--pairs 3]

The targets are random: what they say does not change how long a step takes.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
from fuseline.ingest.models import ModelConfig, ModelFolder
from fuseline.store.arrays import id_dtype
from fuseline.store.dataset import Dataset, PartContent
from fuseline.store.trainings import read_metrics
from fuseline.train.config import TrainingConfig, TrainJob
from fuseline.train.launch import launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens-per-step", type=int, default=2048)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--tail", choices=["renormalise", "ghost"], default="renormalise")
    arguments = parser.parse_args()
    model = ModelFolder(ModelConfig(name="model", model=str(arguments.model)), arguments.model)
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        targets = random_targets(
            Path(folder),
            n_tokens=arguments.tokens_per_step * arguments.steps,
            length=arguments.sequence_length,
            k=arguments.top_k,
            vocab_size=model.vocab_size,
        )
        for pair in range(arguments.pairs):
            seconds = {}
            for name, weight in (("clm", 1.0), ("fused", 0.9)):
                config = TrainingConfig(
                    name=f"{name}-{pair}",
                    clm_weight=weight,
                    tail=arguments.tail,
                    steps=arguments.steps,
                    sequence_length=arguments.sequence_length,
                    global_batch_size=arguments.tokens_per_step // arguments.sequence_length,
                    checkpoint_every=1_000_000,
                )
                seconds[name] = seconds_per_step(config, folder=Path(folder), targets=targets, model=arguments.model)
            ratios.append(seconds["fused"] / seconds["clm"])
            rates = {name: f"{arguments.tokens_per_step / value:.0f} tokens/s" for name, value in seconds.items()}
            print(f"pair {pair}: {rates}, fused step {ratios[-1]:.3f} of the step without", flush=True)
    print(f"{arguments.model.name}, tail {arguments.tail}: a fused step takes {median(ratios):.3f} of a step without fusion")


def random_targets(folder: Path, *, n_tokens: int, length: int, k: int, vocab_size: int) -> Dataset:
    generator = np.random.default_rng(0)
    dataset = Dataset.create(folder / "targets" / "random", identity={})
    logprobs_TK = np.log(generator.dirichlet(np.ones(k + 1), n_tokens)[:, :k])
    arrays = {
        "token_ids_T": generator.integers(0, vocab_size, n_tokens).astype(id_dtype(vocab_size)),
        "segment_offsets": np.arange(0, n_tokens + 1, length),
        "doc_id_S": np.arange(n_tokens // length),
        "segment_S": np.zeros(n_tokens // length, np.uint32),
        "topk_ids_TK": np.argsort(generator.random((n_tokens, 64)), axis=1)[:, :k].astype(id_dtype(vocab_size)),
        "topk_logprobs_TK": logprobs_TK.astype(np.float16),
        "tail_logprob_T": np.log(np.maximum(1 - np.exp(logprobs_TK).sum(1), 1e-6)).astype(np.float16),
    }
    dataset.commit(0, content=PartContent(data=arrays, counts={"tokens": n_tokens}), seconds=0)
    return dataset


def seconds_per_step(config: TrainingConfig, *, folder: Path, targets: Dataset, model: Path) -> float:
    """Median over the steps but the first, which warms up."""
    job = TrainJob(
        run_folder=folder / "runs" / config.name,
        model_folder=model.absolute(),
        model_fingerprint="",
        targets_folder=targets.folder,
        targets_fingerprint=targets.fingerprint,
        tokens_fingerprint="",
        parts=[0],
        export_folder=folder / "exports" / "model",
        lineage={},
        config=config,
    )
    launch(job, on_metrics=lambda record: None)
    return median(record["tokens"] / record["tokens_per_second"] for record in read_metrics(job.run_folder)[1:])


if __name__ == "__main__":
    main()
