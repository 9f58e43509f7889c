"""Time and memory of merging models, against copying one of them.

    python benchmarks/merge.py [--megabytes 2000] [--models 3] [--methods linear,sce,…]

Makes a base and models that moved from it, sharded, in bfloat16, of which a third is one embedding matrix, in a temporary folder that needs
(models + 3) times the size. Each merge is a process of its own. Its time is from the first look at the models until all is on the disk; its
memory is the peak of the whole process (VmHWM), and of that what it had when torch and transformers were loaded. The copy is flushed too.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from fuseline.store import durable
from fuseline.train import weight_files
from fuseline.train.merging.config import MergeConfig
from fuseline.train.merging.merge import merge
from fuseline.train.weight_files import WeightWriter
from timer import timed, timer

HIDDEN, VOCABULARY, SHARD = 2048, 151_936, 700_000_000
METHODS = {
    "linear": {"method": "linear"},
    "slerp": {"method": "slerp"},
    "task_arithmetic": {"method": "task_arithmetic"},
    "varm": {"method": "varm"},
    "dare_linear": {"method": "dare_linear"},
    "dare_ties": {"method": "dare_ties"},
    "ties": {"method": "ties"},
    "sce": {"method": "sce"},
    "sce-mergekit": {"method": "sce", "variant": "mergekit"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--methods", default=",".join(METHODS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make_models(folder, megabytes=arguments.megabytes, n_models=arguments.models)
        print(f"{arguments.models} models and a base of {size / 1e6:.0f} MB each, {torch.get_num_threads()} threads", flush=True)
        for method in arguments.methods.split(","):
            seconds_of_copy = copy(folder)
            found = json.loads(
                subprocess.run([sys.executable, __file__, "--merge", folder, method], check=True, capture_output=True, text=True).stdout
            )
            figures = {
                "s": f"{found['seconds']:.1f}",
                "MB/s written": f"{size / 1e6 / found['seconds']:.0f}",
                "times a copy": f"{found['seconds'] / seconds_of_copy:.1f} ({seconds_of_copy:.1f} s)",
                "MB at the peak": f"{found['peak'] / 1e6:.0f}, {found['before'] / 1e6:.0f} before",
            }
            print(f"{method}:", "; ".join(f"{figure} {unit}" for unit, figure in figures.items()), flush=True)


def make_models(folder: Path, *, megabytes: int, n_models: int) -> int:
    """Write them as `base`, `m0`, `m1` …; returns the bytes of one."""
    n_layers = max(1, round((megabytes * 1e6 / 2 - VOCABULARY * HIDDEN) / (3 * HIDDEN * 4 * HIDDEN)))
    shapes = {"model.embed_tokens.weight": [VOCABULARY, HIDDEN], "model.norm.weight": [HIDDEN]}
    for layer in range(n_layers):
        shapes |= {f"model.layers.{layer}.mlp.{part}_proj.weight": [4 * HIDDEN, HIDDEN] for part in ("gate", "up")}
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = [HIDDEN, 4 * HIDDEN]
    config = {"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "tie_word_embeddings": True}
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))

    def fill(writer: WeightWriter, *, shift: int) -> None:
        for name, (rows, *rest) in shapes.items():
            n_positions = rows * math.prod(rest)
            for start in range(0, n_positions, len(noise)):
                values = (noise * 0.02 + noise.roll(shift) * (0.002 if shift else 0))[: n_positions - start]
                writer.write(name, values.bfloat16(), start=start)

    weight_files.FILE_BYTES = SHARD
    for index in range(n_models + 1):
        place = folder / (f"m{index - 1}" if index else "base")
        place.mkdir()
        (place / "config.json").write_text(json.dumps(config))
        with ExitStack() as stack:
            writer = WeightWriter(shapes=shapes, dtypes=dict.fromkeys(shapes, torch.bfloat16), folder=place, stack=stack)
            fill(writer, shift=index * 1009)
    return sum(path.stat().st_size for path in place.glob("*.safetensors"))


def copy(folder: Path) -> float:
    """Seconds of copying the base, until it is on the disk."""
    with timer() as took:
        shutil.copytree(folder / "base", folder / "copy")
        for path in (folder / "copy").iterdir():
            durable.fsync(path)
    shutil.rmtree(folder / "copy")
    return took.wall


def run_merge(folder: Path, method: str) -> None:
    import transformers.models.auto.configuration_auto  # so that loading it is not measured

    assert transformers
    config = MergeConfig(**METHODS[method])
    models = sorted(path for path in folder.glob("m*") if path.is_dir())
    before = memory("VmRSS")
    output = folder / "merged"
    used = {path.name: path for path in models[: config.most_models]}
    took = timed(lambda: merge(config, base=folder / "base", models=used, output=output, identity={}, lineage={}))
    print(json.dumps({"seconds": took.wall, "before": before, "peak": memory("VmHWM")}))
    shutil.rmtree(output)


def memory(key: str) -> int:
    """Bytes, of this process."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--merge"]:
        run_merge(Path(sys.argv[2]), sys.argv[3])
    else:
        main()
