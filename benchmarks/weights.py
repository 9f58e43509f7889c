"""Memory and time of reading a model into ranks and writing it out again, against reading and writing all of its tensors at once.

    python benchmarks/weights.py [--megabytes 400] [--ranks 2]

The model is random, of Llama's family, in float32. Memory is what a process holds of its own (no pages of files), beyond the parameters and
what it held before.
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from fuseline.train.config import TrainingConfig, TrainJob
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

HIDDEN = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = make_model(Path(folder) / "model", megabytes=arguments.megabytes)
        print(f"{size / 1e6:.0f} MB of weights, the largest tensor {16_000 * HIDDEN * 4 / size:.2f} of them")
        for ranks in sorted({1, arguments.ranks}):
            found = run_ranks(Path(folder), ranks=ranks)
            report(f"{ranks} ranks, rank by rank", found, size=size)
        report("all at once", run_ranks(Path(folder), ranks=0), size=size)


def make_model(folder: Path, *, megabytes: int) -> int:
    """Write a random model of about that size; returns its bytes."""
    layer = 4 * HIDDEN**2 + 3 * HIDDEN * 2816
    config = LlamaConfig(
        vocab_size=16_000,
        hidden_size=HIDDEN,
        intermediate_size=2816,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_hidden_layers=max(1, round((megabytes * 1e6 / 4 - 2 * 16_000 * HIDDEN) / layer)),
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


def run_ranks(folder: Path, *, ranks: int) -> list[dict[str, float]]:
    """What each process measured; 0 ranks: one that handles all tensors at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", folder], env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(max(ranks, 1))
    ]
    if any(process.wait() for process in processes):
        sys.exit("a rank failed")
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(max(ranks, 1))]


def report(name: str, found: list[dict[str, float]], *, size: int) -> None:
    for rank, numbers in enumerate(found):
        ratios = ", ".join(
            f"{key} {numbers[f'{key} bytes'] / size:.2f} of the weights in {numbers[f'{key} s']:.1f} s" for key in ("read", "write")
        )
        print(f"{name}, rank {rank}: {ratios}", flush=True)


def own_memory() -> int:
    """Bytes of this process that are no pages of files."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@contextlib.contextmanager
def measured(found: dict[str, float], key: str) -> Iterator[None]:
    """Seconds, and the peak of this process's memory beyond the larger of what it held before and what it holds after."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, own_memory())

    before, started = own_memory(), time.perf_counter()
    watcher = threading.Thread(target=watch)
    watcher.start()
    yield
    found[f"{key} s"] = time.perf_counter() - started
    done.set()
    watcher.join()
    found[f"{key} bytes"] = max(0, peak - max(before, own_memory()))


def run_rank(folder: Path) -> None:
    found: dict[str, float] = {}
    (by_rank if os.environ["WORLD_SIZE"] != "0" else at_once)(folder, found)
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))


def by_rank(folder: Path, found: dict[str, float]) -> None:
    from fuseline.train.convert import load_weights
    from fuseline.train.export import export
    from fuseline.train.families import read_architecture
    from fuseline.train.model import FusionModel
    from fuseline.train.runtime import open_runtime

    config = TrainingConfig(tensor_parallel=int(os.environ["WORLD_SIZE"]), sequence_length=128, global_batch_size=1)
    with open_runtime(config, choose_arithmetic=lambda: config.dtype) as runtime:
        architecture = read_architecture(folder / "model", training=config)
        model = FusionModel(architecture, runtime=runtime, recompute=False)
        ranks, rank = runtime.tensor_parallel, runtime.tensor_rank
        with measured(found, "read"):
            load_weights(model, model_folder=folder / "model", architecture=architecture, ranks=ranks, rank=rank)
        nothing = {"model_fingerprint": "", "targets_fingerprint": "", "tokens_fingerprint": "", "parts": [0], "lineage": {}}
        places = {"run_folder": folder, "model_folder": folder / "model", "targets_folder": folder, "export_folder": folder / "export"}
        job = TrainJob(**nothing, **places, config=config)
        with measured(found, "write"):
            export(model, job=job, architecture=architecture, runtime=runtime, facts={})


def at_once(folder: Path, found: dict[str, float]) -> None:
    """The plain way: all tensors of the file in memory, copied into parameters; all of them in a dictionary, written as one file."""
    parameters = {name: torch.empty_like(tensor) for name, tensor in load_file(folder / "model" / "model.safetensors").items()}
    with measured(found, "read"):
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model" / "model.safetensors").items()}
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
        del tensors, tensor
    with measured(found, "write"):
        save_file({name: tensor.cpu().clone() for name, tensor in parameters.items()}, folder / "all.safetensors")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        run_rank(Path(sys.argv[2]))
    else:
        main()
