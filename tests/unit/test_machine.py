"""What is asked of the machine: cores by affinity, control groups and Slurm; threads; and which number format is multiplied in."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from fuseline.store import machine
from fuseline.store.machine import arithmetic_for, flops, threads, usable_cores


@pytest.fixture(autouse=True)
def many_cores(monkeypatch):
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)


def groups(folder: Path, *, lines: str, **files: str) -> dict[str, Path]:
    """Control groups as the kernel shows them: the process's own in `lines`, and their files by path."""
    (folder / "cgroup").write_text(lines)
    for path, content in files.items():
        (folder / "sys" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "sys" / path).write_text(content)
    return {"cgroups": folder / "cgroup", "mount": folder / "sys"}


@pytest.mark.parametrize(
    ("lines", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/job/task\n", {"job/task/cpu.max": "max 100000", "job/cpu.max": "400000 100000", "cpu.max": "max 100000"}, 4),
        ("0::/job/task\n", {"job/task/cpu.max": "200000 100000", "job/cpu.max": "400000 100000"}, 2),
        ("4:memory:/\n1:cpu,x:/job\n", {"cpu,x/job/cpu.cfs_quota_us": "500000", "cpu,x/job/cpu.cfs_period_us": "100000"}, 5),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ("1:cpuset:/\n0::/\n", {"cpu.cfs_quota_us": "1", "unified/cpu.max": "700000 100000"}, 7),
        ("0::/hidden\n", {}, 64),
        ("0::/\n", {"cpu.max": "nonsense"}, 64),
    ],
)  # fmt: skip
def test_quotas_of_control_groups_limit_the_cores(tmp_path, lines, files, cores):
    assert usable_cores(**groups(tmp_path, lines=lines, **files)) == cores


def test_affinity_and_slurm_limit_the_cores(tmp_path, monkeypatch):
    place = groups(tmp_path, lines="0::/\n", **{"cpu.max": "300000 100000"})
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    assert usable_cores(**place) == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5}, raising=False)
    assert usable_cores(**place) == 1


def test_the_user_says_how_many_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7,2")
    assert threads() == 7
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert threads() == 1


@pytest.mark.parametrize(("rate", "chosen"), [(0.03, "float32"), (0.6, "float32"), (0.7, "bfloat16"), (1.0, "bfloat16"), (8.0, "bfloat16")])
def test_only_what_is_clearly_slower_than_float32_is_computed_in_it(monkeypatch, rate, chosen):
    monkeypatch.setattr(machine, "flops", lambda dtype: 1e9 if dtype == "float32" else rate * 1e9)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert arithmetic_for("bfloat16") == chosen
    assert arithmetic_for("float16") == chosen.replace("b", "", 1)
    assert arithmetic_for("float32") == "float32"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert arithmetic_for("bfloat16") == "bfloat16"


def test_the_race_is_one_of_multiplying():
    assert 1e8 < flops("float32") < 1e13
    assert flops("float32") == flops("float32"), "one race is run in a process"


@pytest.mark.skipif(platform.machine() not in {"x86_64", "AMD64"}, reason="only oneDNN for x86 can leave instructions out")
def test_a_processor_with_no_more_than_avx2_computes_in_float32():
    code = "import json; from fuseline.store.machine import arithmetic_for as a; print(json.dumps([a('bfloat16'), a('float16')]))"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["float32", "float32"]
