"""What is asked of the machine: cores by affinity, control groups and Slurm; threads; and which number format is multiplied in."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from fuseline.store import machine
from fuseline.store.machine import arithmetic_for, flops, keep_compiled_code, processor_arithmetic_for, threads, usable_cores


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


@pytest.mark.parametrize("choose", [arithmetic_for, processor_arithmetic_for])
def test_what_is_no_short_format_is_computed_in_itself(monkeypatch, choose):
    monkeypatch.setattr(machine, "has_gpu", lambda: pytest.fail("torch takes seconds to load"))
    monkeypatch.setattr(machine, "flops", lambda dtype: pytest.fail("no race is needed"))
    assert [choose("float32"), choose("float64")] == ["float32", "float64"]


def test_a_processor_beside_a_gpu_races_too(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(machine, "flops", {"float32": 9e9, "bfloat16": 1e9}.get)
    assert processor_arithmetic_for("bfloat16") == "float32"


def test_the_race_is_of_three_formats_on_one_thread_and_the_best_round_counts(monkeypatch):
    rounds = {"float32": [5.0, 2.0, 9.0], "bfloat16": [8.0, 4.0, 3.0], "float16": [8.0, 2.5, 2.75]}
    taken = {name: iter(seconds) for name, seconds in rounds.items()}

    def seconds(inputs_RI: torch.Tensor, weights_OI: torch.Tensor) -> float:
        assert inputs_RI.dtype == weights_OI.dtype
        assert torch.get_num_threads() == 1
        return next(taken[str(inputs_RI.dtype).removeprefix("torch.")])

    monkeypatch.setattr(machine, "_ROUNDS", 3)
    monkeypatch.setattr(machine, "_SIZES", (2, 3, 5))
    monkeypatch.setattr(machine, "_seconds", seconds)
    before = torch.get_num_threads()
    machine._race.cache_clear()
    try:
        assert {name: flops(name) for name in rounds} == {"float32": 60 / 2, "bfloat16": 60 / 3, "float16": 60 / 2.5}
        assert [processor_arithmetic_for(name) for name in ("bfloat16", "float16")] == ["float32", "float16"]
    finally:
        machine._race.cache_clear()
    assert torch.get_num_threads() == before


def test_a_round_of_the_race_multiplies():
    assert machine._seconds(torch.ones(4, 3), torch.ones(2, 3)) > 0


# Somebody who may read all, as Python may be in root's home, and write nothing.
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


def can_be_nobody() -> bool:
    return shutil.which("setpriv") is not None and subprocess.run([*NOBODY, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_be_nobody(), reason="only root can start a process as somebody who owns nothing")
def test_where_neither_install_nor_home_can_be_written_compiled_code_is_kept_in_a_temporary_folder(tmp_path):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is its user's alone
        os.chmod(folder, 0o777)
        environment = os.environ | {"HOME": str(tmp_path), "TMPDIR": folder}
        for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
            environment.pop(name, None)
        code = "import os, fuseline.align.edit_distance; print(os.environ['NUMBA_CACHE_DIR'])"
        command = [*NOBODY, sys.executable, "-c", code]
        shown = [subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/", check=False) for _ in range(2)]
        assert [done.returncode for done in shown] == [0, 0], shown[0].stderr
        (path,) = {Path(done.stdout.strip()) for done in shown}
        assert path.parent == Path(folder)
        assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (65534, 0o700)


def test_compiled_code_is_kept_where_numba_keeps_it_if_that_can_be_written(tmp_path, monkeypatch):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def kept(package: Path, *, caches: Path) -> str | None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(caches))
        keep_compiled_code(package)
        return os.environ.pop("NUMBA_CACHE_DIR", None)

    (tmp_path / "file").touch()
    nowhere = tmp_path / "file" / "folder"
    assert kept(tmp_path / "package", caches=nowhere) is None
    assert kept(nowhere, caches=tmp_path / "home" / "caches") is None
    first = Path(kept(nowhere, caches=nowhere))
    assert first.parent == tmp_path
    assert kept(nowhere, caches=nowhere) == str(first)
    first.chmod(0o777)
    assert kept(nowhere, caches=nowhere) != str(first), "others may have put code there"
