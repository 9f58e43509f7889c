"""What an executor costs: starting a worker, its memory, and each part, against the same parts in this process.

    python benchmarks/executors.py                     local, with 2 and 4 workers
    RAY_ADDRESS=… python benchmarks/executors.py ray   on a cluster; `slurm` on a login node

The stage does as good as nothing (a table of one row), so that all time is the executor's; the store's commit is in both sides of a ratio.
"""

import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import polars as pl
import psutil
from fuseline.pipeline.executors.config import ExecutorConfig
from fuseline.pipeline.executors.executor import open_executor
from fuseline.store import journal
from fuseline.store.dataset import Dataset, PartContent
from fuseline.store.workspace import Workspace

N_PARTS = 200


class SmallParts:
    """Each part is one row."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def compute(self, part: int) -> PartContent:
        return PartContent(data=pl.DataFrame({"part": [part]}), counts={"documents": 1})


def measure(config: ExecutorConfig, *, folder: Path) -> dict[str, float]:
    """Seconds until the first worker is ready, seconds per part after that, most parts in flight, and most memory of a worker (MB)."""
    from executors import SmallParts  # by the name under which workers find it

    workspace = Workspace.create(folder)
    stage = SmallParts(workspace.dataset("corpus", "parts", identity={"stage": "benchmark"}))
    committed: list[float] = []
    in_flight, memory = [0], [0.0]
    is_done = threading.Event()
    with workspace.run("corpus", name="parts", parameters={}) as run:
        journal.prepare(run.folder)

        def watch() -> None:
            while not is_done.wait(0.05):
                states = [state for state in journal.read_journals(run.folder) if state.is_alive]
                in_flight.append(sum(len(state.at_hand) for state in states))
                for state in states:
                    try:
                        memory.append(psutil.Process(state.pid).memory_info().rss / 1e6)
                    except psutil.NoSuchProcess:
                        continue

        watcher = threading.Thread(target=watch)
        watcher.start()
        executor = open_executor(config, say=lambda text: None)
        started = time.time()
        executor.run(stage, range(N_PARTS), run_folder=run.folder, on_commit=lambda manifest: committed.append(time.time()))
        is_done.set()
        watcher.join()
        states = list(journal.read_journals(run.folder))
    first = min(state.started_at for state in states)
    return {
        "start-up": first - started,
        "per part": (max(committed) - first) / N_PARTS,
        "in flight": max(in_flight),
        "memory": max(memory),
    }


def main(kinds: list[str]) -> None:
    configs = {"in this process": ExecutorConfig(workers=1)}
    configs |= {f"local, {workers} workers": ExecutorConfig(workers=workers) for workers in (2, 4) if not kinds or "local" in kinds}
    configs |= {f"{kind}, 2 workers": ExecutorConfig(kind=kind, workers=2) for kind in kinds if kind != "local"}
    base = None
    for name, config in configs.items():
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            found = measure(config, folder=Path(folder) / "workspace")
        base = base or found["per part"]
        ratio = found["per part"] / base
        print(
            f"{name:20} start-up {found['start-up']:6.2f} s   per part {found['per part'] * 1e3:6.1f} ms ({ratio:.2f} of in-process)   "
            f"parts in flight {found['in flight']:.0f}   memory of a worker {found['memory']:,.0f} MB"
        )


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    main(sys.argv[1:])
