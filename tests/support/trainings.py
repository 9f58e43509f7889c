"""Small trainings: a model, targets, a job, and ranks that are at work."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import torch
from fuseline.store.corpus_plan import write_plan
from fuseline.store.dataset import Dataset, PartContent
from fuseline.store.trainings import read_metrics
from fuseline.train.config import TrainingConfig, TrainJob
from fuseline.train.launch import launch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, TOPK, STEPS = 259, 8, 32
DOMAINS = ["code", "law", "news"]
SETTINGS = {
    "steps": STEPS,
    "sequence_length": 64,
    "global_batch_size": 4,
    "clm_weight": 0.9,
    "learning_rate": 1e-3,
    "min_learning_rate_ratio": 0.1,
    "checkpoint_every": 7,
    "keep_checkpoints": 5,
    "seed": 5,
}


def write_inputs(folder: Path) -> Path:
    """A tiny model with a vocabulary that two ranks must pad, and random targets."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.08,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "model" / "tokenizer.json").write_text("{}")
    write_targets(folder / "targets")
    (folder / "corpus").mkdir()
    documents = pl.DataFrame({"doc_id": range(300), "domain": DOMAINS * 100})
    write_plan(folder / "corpus", documents=documents, summary={"parts": []})
    return folder


def write_targets(folder: Path, *, spoil: bool = False) -> Dataset:
    generator = np.random.default_rng(0)
    dataset = Dataset.create(folder, identity={"targets": "test", "spoiled": spoil})
    for part in range(3):
        offsets = np.concatenate([[0], generator.integers(2, 90, 20).cumsum()]).astype(np.int64)
        n = int(offsets[-1])
        masses = generator.dirichlet(np.ones(TOPK + 1), n)
        logprobs_TK = np.log(masses[:, :TOPK])
        logprobs_TK[::11] = -np.inf
        if spoil and part == 1:
            logprobs_TK[offsets[7]] = np.nan
        arrays = {
            "token_ids_T": generator.integers(0, VOCAB, n).astype(np.uint16),
            "segment_offsets": offsets,
            "doc_id_S": 100 * part + np.arange(len(offsets) - 1),
            "topk_ids_TK": generator.permuted(np.tile(np.arange(VOCAB), (n, 1)), axis=1)[:, :TOPK].astype(np.uint16),
            "topk_logprobs_TK": logprobs_TK.astype(np.float16),
            "tail_logprob_T": np.log(masses[:, TOPK]).astype(np.float16),
        }
        dataset.commit(part, content=PartContent(data=arrays, counts={"tokens": n}), seconds=0.0)
    return dataset


def make_job(inputs: Path, run_folder: Path, *, targets: str = "targets", **settings) -> TrainJob:
    dataset = Dataset.open(inputs / targets)
    return TrainJob(
        run_folder=run_folder,
        model_folder=inputs / "model",
        model_fingerprint="tiny",
        targets_folder=dataset.folder,
        targets_fingerprint=dataset.fingerprint,
        tokens_fingerprint="tokens",
        parts=dataset.parts(),
        corpus_folder=inputs / "corpus",
        export_folder=run_folder / "export",
        lineage={"sources": ["one", "two"]},
        config=TrainingConfig(**SETTINGS | settings),
    )


def train(job: TrainJob) -> list[dict]:
    found = []
    launch(job, on_metrics=found.append)
    return found


def start_and_wait(job: TrainJob, *, until_step: int) -> subprocess.Popen:
    """Launch in a process group of its own, and return once a step's metrics are there."""
    job.save()
    code = (
        "import sys, pathlib; from fuseline.train.launch import launch; from fuseline.train.config import TrainJob;"
        "launch(TrainJob.load(pathlib.Path(sys.argv[1])), on_metrics=lambda record: print(record['step'], flush=True))"
    )
    with (job.run_folder / "launcher.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", code, job.run_folder], stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 60
    while not any(record["step"] >= until_step for record in read_metrics(job.run_folder)):
        assert time.monotonic() < deadline
        assert process.poll() is None, (job.run_folder / "launcher.log").read_text()
        time.sleep(0.01)
    return process
