"""How OpenMP's threads should wait for each other: a forward pass and a training step, alone and with other work on the machine.

    python benchmarks/threads.py MODEL_FOLDER

Each line is a process of its own with other settings. Seconds are the smallest of the rounds; processor seconds are of the same round.
Beside the work run as many processes that do nothing but count as `busy` says.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from timer import timed

SETTINGS = {"as it comes": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}, "active": {"OMP_WAIT_POLICY": "ACTIVE"}}
TOKENS, ROUNDS = 512, 3


def main() -> None:
    """Measure every setting, or in the process of one that setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--here", action="store_true", help="measure in this process")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2], help="other processes beside the work")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measured(arguments.model)))
        return
    for busy in arguments.busy:
        for threads in arguments.threads:
            for name, environment in SETTINGS.items():
                others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
                try:
                    command = [sys.executable, __file__, str(arguments.model), "--here"]
                    environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | environment
                    found = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
                finally:
                    for other in others:
                        other.kill()
                        other.wait()
                figures = ", ".join(f"{work} {wall:.2f} s ({cpu:.2f} of the processor)" for work, (wall, cpu) in found.items())
                print(f"busy {busy}, threads {threads}, {name}: {figures}", flush=True)


def measured(folder: Path) -> dict[str, tuple[float, float]]:
    """Seconds and processor seconds of the work, by its name."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    token_ids_BL = torch.arange(TOKENS)[None]

    def forward() -> None:
        with torch.inference_mode():
            model(token_ids_BL)

    def training_step() -> None:
        model(token_ids_BL, labels=token_ids_BL).loss.backward()
        model.zero_grad()

    return {work.__name__.replace("_", " "): min(both(work) for _ in range(ROUNDS)) for work in (forward, training_step)}


def both(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds and processor seconds that a function takes."""
    took = timed(work)
    return took.wall, took.processor


if __name__ == "__main__":
    main()
