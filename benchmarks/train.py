"""A training step with fused targets against the same step without (clm_weight = 1), and against `transformers.Trainer` with plain CE.

    python benchmarks/train.py MODEL_FOLDER [--sequence-length 512] [--sequences 4] [--micro-batch-size 2] [--rounds 5] [--tail ghost]
    python benchmarks/train.py --llama 1b --dtype bfloat16 --sequence-length 2048 --sequences 32 --micro-batch-size 8       # on a GPU

The steps of one trainer with and without targets take turns, so that both meet the same machine; on CPUs the processor's time is
compared, because others may be at work. `transformers.Trainer` runs in a process of its own before and after, and so do those whose
peak memory is told. What the targets say is random: it does not change how long a step takes. `--llama` makes a model of that size
and shape with random weights. The peer needs `accelerate`; without it that comparison is left out.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np
import torch
from fuseline.store.arrays import id_dtype
from fuseline.store.dataset import Dataset, PartContent
from fuseline.train.config import TrainingConfig, TrainJob
from fuseline.train.cost import step_flops
from fuseline.train.loss import fusion_loss
from fuseline.train.runtime import open_runtime
from fuseline.train.trainer import Trainer
from timer import timed, timer
from transformers import AutoModelForCausalLM, LlamaConfig

LLAMAS = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
    "tiny": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4},
}
CHILDREN = ("steps", "memory-clm", "memory-fused", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--llama", choices=LLAMAS)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=4, help="in an optimizer step")
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--tail", choices=["renormalise", "ghost"], default="ghost")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or random_llama(Path(folder) / "llama", shape=LLAMAS[arguments.llama], dtype=arguments.dtype)
        given = [text for text in sys.argv[1:] if text != str(arguments.model)]
        found = {name: in_process(name, model=model, arguments=given) for name in ("memory-clm", "memory-fused")}
        has_peer = find_spec("accelerate") is not None
        peers = [in_process("transformers", model=model, arguments=given)] if has_peer else []
        steps = in_process("steps", model=model, arguments=given)
        peers += [in_process("transformers", model=model, arguments=given)] if has_peer else []
    tell(arguments, steps=steps, memory=[found[name]["peak_memory"] for name in ("memory-clm", "memory-fused")], peers=peers)


def tell(arguments: argparse.Namespace, *, steps: dict, memory: list[int], peers: list[dict]) -> None:
    """Print the figures, and on what they were measured."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor() or platform.machine()} CPU"
    print(f"{device}, torch {torch.__version__}; {' '.join(sys.argv[1:])}")
    fused, clm = median(steps["fused"]), median(steps["clm"])
    ratio = median(f / c for f, c in zip(steps["fused"], steps["clm"], strict=True))
    print(f"step with fused targets: {fused:.3f} s, {steps['tokens'] / fused:,.0f} tokens/s; without: {clm:.3f} s; ratio {ratio:.3f}")
    print(f"the loss is {steps['loss_seconds'] / fused:.1%} of a step; peak memory {memory[1] / memory[0]:.3f} of that without targets")
    if steps["mfu"] is not None:
        print(f"MFU {steps['mfu']:.1%}")
    if peers:
        peer = median(seconds for found in peers for seconds in found["seconds"])
        print(
            f"transformers.Trainer: {peer:.3f} s, so a step with fused targets takes {fused / peer:.3f} of it, one without {clm / peer:.3f}"
        )


def in_process(name: str, *, model: Path, arguments: list[str]) -> dict:
    """What a child process measures."""
    command = [sys.executable, __file__, str(model), *arguments, "--child", name]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(20000 + os.getpid() % 10000)}
    run = subprocess.run(command, env=os.environ | ({} if name == "transformers" else place), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def child(arguments: argparse.Namespace) -> dict:
    """One of `CHILDREN`."""
    if arguments.child == "transformers":
        return {"seconds": transformers_steps(arguments)}
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(
            clm_weight=1.0 if arguments.child == "memory-clm" else 0.9,
            tail=arguments.tail,
            dtype=arguments.dtype,
            steps=1000,
            sequence_length=arguments.sequence_length,
            global_batch_size=arguments.sequences,
            micro_batch_size=arguments.micro_batch_size,
            recompute=arguments.recompute,
        )
        with open_runtime(config, choose_arithmetic=lambda: config.dtype) as runtime:
            trainer = Trainer(make_job(arguments, config=config, folder=Path(folder)), runtime=runtime)
            if arguments.child == "steps":
                return measured_steps(trainer, rounds=arguments.rounds)
            for step in range(2):
                trainer.train_step(step, trainer.data.micro_batches(step, data_rank=0), data_wait_seconds=0)
            return {"peak_memory": runtime.peak_memory}


def measured_steps(trainer: Trainer, *, rounds: int) -> dict:
    """Seconds of steps with and without targets, in turn, and of the loss alone."""
    batch = trainer.data.micro_batches(0, data_rank=0)
    batches = {"fused": batch, "clm": [replace(micro_batch, soft=None) for micro_batch in batch]}
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for i in range(rounds + 1):
        for name, micro_batches in batches.items():
            taken = timed(lambda: trainer.train_step(0, micro_batches, data_wait_seconds=0)).computing  # noqa: B023 (called at once)
            if i:  # the first warms up
                seconds[name].append(taken)
    lengths = [length for micro_batch in batch for length in micro_batch.lengths]
    flops = step_flops(trainer.architecture, parameters=sum(p.numel() for p in trainer.model.parameters()), lengths=lengths)
    peak = trainer.runtime.peak_flops
    return seconds | {
        "tokens": sum(lengths),
        "loss_seconds": len(batch) * loss_seconds(trainer, rounds=rounds),
        "mfu": None if peak is None else flops / median(seconds["fused"]) / peak,
    }


def loss_seconds(trainer: Trainer, *, rounds: int) -> float:
    """Of one micro-batch, forward and backward."""
    micro_batch = trainer.data.micro_batches(0, data_rank=0)[0].to(trainer.runtime.device)
    shape = (len(micro_batch.token_ids_T), trainer.architecture.vocab_size)

    def once() -> None:
        logits_NV = torch.randn(shape, dtype=trainer.runtime.dtype, device=trainer.runtime.device).requires_grad_() * 1
        taken.append(timed(lambda: one_loss(logits_NV)).computing)

    def one_loss(logits_NV: torch.Tensor) -> None:
        ce_N, soft_N = fusion_loss(
            logits_NV,
            labels_N=micro_batch.labels_T,
            soft=micro_batch.soft,
            group=None,
            vocab_size=shape[1],
            chunk_elements=trainer.runtime.loss_chunk_elements,
        )
        (ce_N.sum() + soft_N.sum()).backward()

    taken: list[float] = []
    for _ in range(rounds):
        once()
    return median(taken)


def transformers_steps(arguments: argparse.Namespace) -> list[float]:
    """Seconds of the steps of `transformers.Trainer` with plain CE on batches of the same shape; the first is left out."""
    from transformers import Trainer as Peer
    from transformers import TrainerCallback, TrainingArguments

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__) -> None:
            self.running = timer()
            self.took = self.running.__enter__()

        def on_step_end(self, *_, **__) -> None:
            self.running.__exit__(None, None, None)
            seconds.append(self.took.computing)

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    if arguments.recompute:
        model.gradient_checkpointing_enable()
    generator = np.random.default_rng(0)
    steps = arguments.rounds + 1
    rows = generator.integers(0, model.config.vocab_size, (steps * arguments.sequences, arguments.sequence_length))
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=arguments.micro_batch_size,
            gradient_accumulation_steps=arguments.sequences // arguments.micro_batch_size,
            learning_rate=1e-5,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        data = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in rows]
        Peer(model=model, args=settings, train_dataset=data, callbacks=[Clock()]).train()
    return seconds[1:]


def make_job(arguments: argparse.Namespace, *, config: TrainingConfig, folder: Path) -> TrainJob:
    """A job over random targets for four steps' tokens."""
    vocab_size = json.loads((arguments.model / "config.json").read_text())["vocab_size"]
    targets = random_targets(
        folder,
        n_tokens=4 * arguments.sequences * arguments.sequence_length,
        length=arguments.sequence_length,
        k=arguments.top_k,
        vocab_size=vocab_size,
    )
    return TrainJob(
        run_folder=folder / "run",
        model_folder=arguments.model.absolute(),
        model_fingerprint="",
        targets_folder=targets.folder,
        targets_fingerprint=targets.fingerprint,
        tokens_fingerprint="",
        parts=[0],
        export_folder=folder / "export",
        lineage={},
        config=config,
    )


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


def random_llama(folder: Path, *, shape: dict[str, int], dtype: str) -> Path:
    """A Llama with random weights."""
    config = LlamaConfig(vocab_size=128_256, max_position_embeddings=8192, tie_word_embeddings=True, **shape)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
