"""What is published is complete and flushed, whatever happens on the way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuseline.store import durable


class Recorder:
    """Notes each flush and rename of `os` in order, with what had been flushed when a name appeared."""

    def __init__(self, monkeypatch) -> None:
        self.flushed: set[int] = set()  # inodes
        self.renames: list[tuple[Path, set[int], set[int]]] = []  # (new name, inodes under it, inodes flushed until then)
        fsync, replace = os.fsync, os.replace

        def noted_fsync(descriptor):
            fsync(descriptor)
            self.flushed.add(os.fstat(descriptor).st_ino)

        def noted_replace(old, new):
            inodes = {path.stat().st_ino for path in [Path(old), *Path(old).rglob("*")]}
            self.renames.append((Path(new), inodes, set(self.flushed)))
            self.flushed.discard(Path(new).parent.stat().st_ino)  # its entries change
            replace(old, new)

        monkeypatch.setattr(os, "fsync", noted_fsync)
        monkeypatch.setattr(os, "replace", noted_replace)

    def assert_durable(self) -> None:
        assert self.renames
        for new, inodes, flushed in self.renames:
            assert inodes <= flushed, f"{new} appeared before all of it was on the disk"
            assert new.parent.stat().st_ino in self.flushed, f"the folder of {new} was not flushed afterwards"


def test_a_file_is_flushed_before_its_name_appears_and_its_folder_after(tmp_path, monkeypatch):
    recorder = Recorder(monkeypatch)
    durable.write_json(tmp_path / "small.json", {"a": "ü"})
    recorder.assert_durable()
    assert (tmp_path / "small.json").read_text(encoding="utf-8") == '{\n "a": "ü"\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["small.json"]


def test_a_folder_is_flushed_with_all_in_it_before_its_name_appears(tmp_path, monkeypatch):
    recorder = Recorder(monkeypatch)
    temporary = durable.temporary_sibling(tmp_path / "part.zarr")
    (temporary / "a" / "c").mkdir(parents=True)
    (temporary / "a" / "c" / "0").write_bytes(b"0")
    (temporary / "zarr.json").write_bytes(b"{}")
    durable.publish(temporary, to=tmp_path / "part.zarr")
    recorder.assert_durable()
    assert (tmp_path / "part.zarr" / "a" / "c" / "0").read_bytes() == b"0"


def test_a_file_is_replaced_whole(tmp_path):
    durable.write_bytes(tmp_path / "x", b"a longer first version")
    durable.write_bytes(tmp_path / "x", b"second")
    assert (tmp_path / "x").read_bytes() == b"second"


def test_a_folder_left_by_a_crash_is_replaced_whole(tmp_path):
    left = tmp_path / "part.zarr"
    (left / "old").mkdir(parents=True)
    (left / "old" / "chunk").write_bytes(b"half")
    temporary = durable.temporary_sibling(left)
    temporary.mkdir()
    (temporary / "new").write_bytes(b"whole")
    durable.publish(temporary, to=left)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["part.zarr", "part.zarr/new"]


def test_temporaries_lie_in_the_same_folder_and_are_nobody_elses(tmp_path):
    temporary = durable.temporary_sibling(tmp_path / "part-00001.json")
    assert temporary.parent == tmp_path
    assert temporary.name.startswith(durable.TEMPORARY)
    assert str(os.getpid()) in temporary.name
    assert temporary != durable.temporary_sibling(tmp_path / "part-00002.json")


def test_sweep_removes_temporaries_and_nothing_else(tmp_path):
    (tmp_path / f"{durable.TEMPORARY}1-part.zarr" / "a").mkdir(parents=True)
    (tmp_path / f"{durable.TEMPORARY}1-part.zarr" / "a" / "0").write_bytes(b"0")
    (tmp_path / f"{durable.TEMPORARY}2-part.json").write_bytes(b"{")
    (tmp_path / "part.json").write_bytes(b"{}")
    (tmp_path / "part.zarr").mkdir()
    durable.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part.json", "part.zarr"]


def test_removing_what_is_not_there_is_harmless_and_a_folder_goes_with_all_in_it(tmp_path):
    durable.remove(tmp_path / "nothing")
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    durable.remove(tmp_path / "folder")
    assert not list(tmp_path.iterdir())


# A worker that is killed at its n-th step of committing a part. It forks for each n, so that importing is paid for once.
CRASHES = """
import json, os, shutil, signal, sys
from pathlib import Path
import numpy as np, polars as pl
from fuseline.store import durable
from fuseline.store.dataset import Dataset, PartContent

root, kind, left = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "left"
content = PartContent(
    data=pl.DataFrame({"text": ["x", "y"] * 50}) if kind == "table" else {
        "ids_T": np.arange(1, 5000, dtype=np.uint32), "zeros_T": np.zeros(7)},
    counts={"tokens": 3}, attributes={"a": 1},
)

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def commit(folder):
    Dataset.create(folder, identity={"x": 1}).commit(0, content=content, seconds=1)

def killed_at(folder, n):
    seen = 0
    def step(function):
        def wrapped(*args, **kwargs):
            nonlocal seen
            seen += 1
            if seen == n:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            seen += 1
            if seen == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return wrapped
    for name in ("fsync", "replace", "rename", "unlink", "rmdir"):
        setattr(os, name, step(getattr(os, name)))
    commit(folder)

def check(folder, *, whole):
    dataset = Dataset.open(folder)
    assert dataset.parts() == [0] or (dataset.parts() == [] and not whole), dataset.parts()
    if dataset.parts():
        assert dataset.manifest(0).counts == {"tokens": 3}
        if kind == "table":
            assert dataset.table(0).equals(content.data)
        else:
            for name, array in zip(content.data, dataset.read(0, *content.data)):
                assert array.dtype == content.data[name].dtype and np.array_equal(array, content.data[name]), name
    if whole:
        durable.sweep(folder)
        assert sorted(path.name for path in folder.iterdir()) == ["dataset.json", dataset.manifest(0).payload[:10] + ".json",
                                                                  dataset.manifest(0).payload]

steps = absent = 0
for n in range(1, 1000):
    folder = root / f"{n}" / "kind" / "name"
    Dataset.create(folder, identity={"x": 1})
    if left:  # what a crash between payload and manifest leaves behind, of other content
        if kind == "table":
            (folder / "part-00000.parquet").write_bytes(b"half")
        else:
            (folder / "part-00000.zarr" / "ids_T").mkdir(parents=True)
            (folder / "part-00000.zarr" / "ids_T" / "zarr.json").write_bytes(b"half")
    code = child(lambda: killed_at(folder, n))
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    steps += 1
    absent += not Dataset.open(folder).parts()
    assert child(lambda: check(folder, whole=False)) == 0, n
    assert child(lambda: commit(folder)) == 0, n
    assert child(lambda: check(folder, whole=True)) == 0, n
    shutil.rmtree(root / f"{n}")
print(json.dumps([steps, absent]))
"""


@pytest.mark.parametrize("left", ["clean", "left"])
@pytest.mark.parametrize("kind", ["arrays", "table"])
def test_a_part_whose_worker_is_killed_at_any_step_is_absent_or_complete(tmp_path, kind, left):
    script = tmp_path / "crashes.py"
    script.write_text(CRASHES)
    done = subprocess.run([sys.executable, script, tmp_path / "root", kind, left], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    steps, absent = map(int, done.stdout.strip().strip("[]").split(","))
    # Two steps for every flush and rename: of each file and folder of the payload, of the manifest, and of the folder around them.
    least = {"arrays": 2 * (4 + 4 + 2 + 3), "table": 2 * (3 + 3)}[kind]
    assert steps >= least
    assert 0 < steps - absent < steps, "the manifest must appear at a step in between"
