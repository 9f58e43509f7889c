"""What is published is complete and flushed, whatever happens on the way."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fuseline.store import durable


class Recorder:
    """Notes each flush and rename of `os` in order, with what had been flushed when a name appeared."""

    def __init__(self, monkeypatch) -> None:
        self.flushed: set[int] = set()  # inodes
        self.renames: list[tuple[Path, set[int], set[int]]] = []  # (new name, inodes under it, inodes flushed until then)
        fsync = os.fsync

        def noted_fsync(descriptor):
            fsync(descriptor)
            self.flushed.add(os.fstat(descriptor).st_ino)

        def noted(function):
            def wrapped(old, new):
                inodes = {path.stat().st_ino for path in [Path(old), *Path(old).rglob("*")]}
                self.renames.append((Path(new), inodes, set(self.flushed)))
                self.flushed.discard(Path(new).parent.stat().st_ino)  # its entries change
                function(old, new)

            return wrapped

        monkeypatch.setattr(os, "fsync", noted_fsync)
        for name in ("replace", "rename", "link"):
            monkeypatch.setattr(os, name, noted(getattr(os, name)))

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


def test_a_folder_is_replaced_whole(tmp_path):
    left = tmp_path / "part.zarr"
    (left / "old").mkdir(parents=True)
    (left / "old" / "chunk").write_bytes(b"half")
    temporary = durable.temporary_sibling(left)
    temporary.mkdir()
    (temporary / "new").write_bytes(b"whole")
    durable.publish(temporary, to=left)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["part.zarr", "part.zarr/new"]


@pytest.mark.parametrize("kind", ["file", "folder", "other kind"])
def test_what_is_new_takes_no_other_name(tmp_path, kind):
    there, temporary = tmp_path / "part", durable.temporary_sibling(tmp_path / "part")
    if kind == "folder":
        there.mkdir()
        (there / "old").write_bytes(b"old")
    else:
        there.write_bytes(b"old")
    if kind == "file":
        temporary.write_bytes(b"new")
    else:
        temporary.mkdir()
        (temporary / "new").write_bytes(b"new")
    with pytest.raises(FileExistsError):
        durable.publish_new(temporary, to=there)
    assert temporary.exists()
    assert (there / "old" if kind == "folder" else there).read_bytes() == b"old"
    durable.publish_new(temporary, to=tmp_path / "free")
    assert not temporary.exists()
    assert (tmp_path / "free" if kind == "file" else tmp_path / "free" / "new").read_bytes() == b"new"


def test_what_is_new_is_flushed_before_its_name_appears_and_its_folder_after(tmp_path, monkeypatch):
    recorder = Recorder(monkeypatch)
    durable.write_new_json(tmp_path / "part.json", {})
    temporary = durable.temporary_sibling(tmp_path / "part.zarr")
    (temporary / "a").mkdir(parents=True)
    (temporary / "a" / "0").write_bytes(b"0")
    durable.publish_new(temporary, to=tmp_path / "part.zarr")
    assert {new.name for new, _, _ in recorder.renames} == {"part.json", "part.zarr"}
    recorder.assert_durable()


def test_temporaries_lie_in_the_same_folder_and_are_nobody_elses(tmp_path):
    path = tmp_path / "part-00001.json"
    names = {durable.temporary_sibling(path) for _ in range(50)}
    assert len(names) == 50
    for name in names:
        assert name.parent == tmp_path
        assert name.name.startswith(durable.TEMPORARY)
        assert not durable.is_abandoned(_made(name)), "this process is alive"


def test_a_temporary_goes_with_its_block_unless_it_was_published(tmp_path):
    with pytest.raises(ZeroDivisionError), durable.temporary(tmp_path / "x") as name:  # noqa: PT012
        name.mkdir()
        (name / "half").write_bytes(b"half")
        raise ZeroDivisionError
    with durable.temporary(tmp_path / "x") as name:
        name.write_bytes(b"whole")
        durable.publish(name, to=tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def _made(path: Path, *, age: float = 0) -> Path:
    path.write_bytes(b"{")
    os.utime(path, (time.time() - age,) * 2)
    return path


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_sweep_removes_what_the_dead_left_and_nothing_else(tmp_path, dead_pid):
    own = durable.temporary_sibling(tmp_path / "part.json").name
    day = 24 * 3600

    def named(name: str, *, age: float = 0) -> str:
        return _made(tmp_path / name, age=age).name

    kept = {
        named(own),
        named(own.replace("@", "-other@", 2).replace("-other@", "@", 1), age=day - 100),
        named(".tmp-step-00000001"),
        named("part.json", age=2 * day),
    }
    named(own.replace(str(os.getpid()), str(dead_pid), 1))
    named(own.replace("@", "-other@", 2).replace("-other@", "@", 1) + "2", age=day + 100)
    named(own + "3", age=10 * day)  # of another process that had this one's number
    named(".tmp-step-00000002", age=2 * day)
    folder = tmp_path / (own.replace(str(os.getpid()), str(dead_pid), 1) + ".zarr")
    (folder / "a").mkdir(parents=True)
    _made(folder / "a" / "0")
    durable.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept
    durable.sweep(tmp_path, alone=True)
    assert [path.name for path in tmp_path.iterdir()] == ["part.json"]


def test_a_folder_of_another_host_stays_while_anything_in_it_is_touched(tmp_path):
    folder = tmp_path / ".tmp-1@elsewhere@00@part.zarr"
    (folder / "a").mkdir(parents=True)
    _made(folder / "a" / "0")
    os.utime(folder / "a", (0, 0))
    os.utime(folder, (0, 0))
    assert not durable.is_abandoned(folder)
    os.utime(folder / "a" / "0", (0, 0))
    assert durable.is_abandoned(folder)


def test_removing_what_is_not_there_is_harmless_and_a_folder_goes_with_all_in_it(tmp_path):
    durable.remove(tmp_path / "nothing")
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    durable.remove(tmp_path / "folder")
    assert not list(tmp_path.iterdir())
