"""This machine: how many cores this process may use, and which number format it multiplies fastest.

Processors without instructions for bfloat16 or float16 multiply them many times slower than float32 (an AVX2-only EPYC: 1.1 against 40
GFLOP/s). On these, weights rounded to the 16-bit format are multiplied in float32. The speed is measured, because processor flags differ
by maker. Imports torch only to measure.
"""

import contextlib
import functools
import math
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Rows, inputs, outputs of a small model's layers. At 1 GFLOP/s all rounds take a quarter of a second, else a few milliseconds.
_SIZES = (64, 512, 576)
_ROUNDS = 6
_SHORT = ("bfloat16", "float16")
_CLEARLY = 1.5  # float32 must be faster by this factor: smaller differences are noise, and the 16-bit format needs half the memory


def usable_cores(*, cgroups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: by its affinity, the quotas of its control groups, and Slurm's allocation for its task."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [max(1, math.floor(quota)) for quota in _quotas(cgroups, mount=mount)]
    slurm = [int(value) for value in [os.environ.get("SLURM_CPUS_PER_TASK", "")] if value.isdigit() and int(value)]
    return min([cores, *quotas, *slurm])


def threads() -> int:
    """Threads that this process computes with: OMP_NUM_THREADS if the user or an executor set it, else all usable cores."""
    said = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # a list gives nested levels
    return int(said) if said.isdigit() and int(said) else usable_cores()


def use_threads() -> None:
    """Let torch compute with `threads` threads: its default ignores quotas and Slurm."""
    import torch

    if torch.get_num_threads() != threads():
        torch.set_num_threads(threads())


def wait_asleep() -> None:
    """Let OpenMP's threads sleep while they wait, here and in child processes. Call it before torch is imported.

    By default they spin, and take cores from other work and from each other (`benchmarks/threads.py`). The user's setting is kept.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def keep_compiled_code(package: Path) -> None:
    """Let numba cache compiled code in a temporary folder, here and in child processes, if no other place is writable. Call it before
    numba is imported.

    Numba tries `__pycache__` beside the modules in `package`, then the user's cache folder. If it can write to neither, the modules cannot
    be imported, for example in a container without a home folder.
    """
    user = Path(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))) / "numba"
    beside = [package / folder / "__pycache__" for folder in ("align", "train")]
    if "NUMBA_CACHE_DIR" not in os.environ and not all(map(_can_write, beside)) and not _can_write(user):
        os.environ["NUMBA_CACHE_DIR"] = str(_own_temporary_folder("fuseline-numba"))


def _can_write(folder: Path) -> bool:
    """Whether files can be created in a folder, or the folder can be created."""
    there = next(place for place in (folder, *folder.parents) if os.path.exists(place))  # Path.exists raises without permission
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _own_temporary_folder(name: str) -> Path:
    """Always the same folder if only this user can write into it, because compiled code is run from it; else a new one."""
    folder = Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if is_own else Path(tempfile.mkdtemp(prefix=f"{name}-"))


def _quotas(cgroups: Path, *, mount: Path) -> Iterator[float]:
    """Cores by the quota of each control group that this process is in (version 2: `cpu.max`; version 1: `cpu.cfs_quota_us`)."""
    lines = cgroups.read_text(encoding="utf-8").splitlines() if cgroups.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "cpu" not in controllers.split(","):
            continue
        for root in (mount, mount / "unified") if not controllers else (mount / controllers, mount / "cpu"):
            group = root / path.lstrip("/")
            for folder in (group, *group.parents):
                yield from _quota_of(folder)
                if folder == root:
                    break


def _quota_of(folder: Path) -> Iterator[float]:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        elif (folder / "cpu.cfs_quota_us").is_file():
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8").strip() for name in ("quota", "period"))
        else:
            return
        if quota not in {"max", "-1"}:
            yield int(quota) / int(period)
    except (OSError, ValueError):  # a group may disappear, and a container may hide its files: then the quota is unknown
        return


def arithmetic_for(dtype: str) -> str:
    """The number format for products with weights of `dtype` on this machine: `dtype`, or `float32` if clearly faster.

    On CUDA it is `dtype`.
    """
    return dtype if dtype not in _SHORT or has_gpu() else processor_arithmetic_for(dtype)


def processor_arithmetic_for(dtype: str) -> str:
    """The same on this machine's processor, even if there is a GPU."""
    if dtype not in _SHORT:
        return dtype
    return "float32" if flops("float32") >= _CLEARLY * flops(dtype) else dtype


def has_gpu() -> bool:
    """Whether models run on a GPU on this machine."""
    import torch

    return torch.cuda.is_available()


def flops(dtype: str) -> float:
    """Floating-point operations per second of matrix products on one core of this machine's processor; measured once per process."""
    return _race()[dtype]


@functools.cache
def _race() -> dict[str, float]:
    """The best round of each format. The formats take turns, with one thread, so that other work on the machine affects both."""
    import torch

    rows, inputs, outputs = _SIZES
    operands = {
        name: (torch.ones(rows, inputs, dtype=getattr(torch, name)), torch.ones(outputs, inputs, dtype=getattr(torch, name)))
        for name in ("float32", *_SHORT)
    }
    seconds, before = dict.fromkeys(operands, math.inf), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(_ROUNDS):  # the first round prepares kernels, and is never the best
            for name, (inputs_RI, weights_OI) in operands.items():
                seconds[name] = min(seconds[name], _seconds(inputs_RI, weights_OI))
    finally:
        torch.set_num_threads(before)
    return {name: 2.0 * rows * inputs * outputs / taken for name, taken in seconds.items()}


def _seconds(inputs_RI: "torch.Tensor", weights_OI: "torch.Tensor") -> float:
    import torch

    with torch.inference_mode():
        started = time.perf_counter()
        torch.nn.functional.linear(inputs_RI, weights_OI)
        return time.perf_counter() - started
