"""Names and links in a workspace that a stranger made: nothing outside of it is read, changed or deleted, and every command works again."""

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fuseline.pipeline.repair import _interrupted
from fuseline.store import durable
from fuseline.store.dataset import Dataset, PartContent
from fuseline.store.errors import DamagedPart, FuselineError
from fuseline.store.fingerprint import sealed
from fuseline.store.trainings import checkpoint_damage, checkpoint_steps, seal_checkpoint
from fuseline.store.upkeep import delete, leftovers
from fuseline.store.verify import verify
from fuseline.store.workspace import Workspace

CONTENT = PartContent(data={"nll_S": np.arange(3.0), "ids_T": np.arange(9)}, counts={"segments": 3}, attributes={"sources": ["y"]})
OLD = (1e9, 1e9)  # seconds since 1970: older than anything that gc leaves alone


@pytest.fixture(autouse=True)
def limited() -> Iterator[None]:
    """End a test that waits for ever, at a pipe for example."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it has waited for two minutes"))
    signal.alarm(120)
    yield
    signal.alarm(0)


@pytest.fixture
def outside(tmp_path) -> Path:
    """A folder of the user's that has nothing to do with the workspace."""
    folder = tmp_path / "outside"
    (folder / "deep").mkdir(parents=True)
    for name in ("secret.txt", "deep/part-00000.zarr", "settings.json"):
        (folder / name).write_text("mine")
    for path in (folder, *folder.rglob("*")):
        os.utime(path, OLD)
    return folder


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace.create(tmp_path / "workspace")


@pytest.fixture
def dataset(workspace) -> Dataset:
    made = workspace.dataset("targets", "fused", identity={"stage": "x", "sources": [["y"]]}, description={"corpus": "c"})
    for part in (0, 1):
        made.commit(part, content=CONTENT, seconds=0)
    return made


def state_of(folder: Path) -> str:
    """A hash of everything in a folder: names, kinds and contents."""
    found = [(str(path.relative_to(folder)), path.read_bytes() if path.is_file() else b"") for path in sorted(folder.rglob("*"))]
    return hashlib.sha256(repr(found).encode()).hexdigest()


def forge(path: Path, *, has_checksum: bool, **changes: object) -> None:
    """Change a manifest as somebody does who knows how its checksum is made, or leave it out, as of old."""
    record = json.loads(path.read_text())
    del record["checksum"]
    record |= changes
    path.write_text(json.dumps(sealed(record) if has_checksum else record))


PAYLOADS = [
    "part-00000.zarr/../../../../outside",
    "part-00000/../../../../outside",
    "../../../outside",
    "part-00000.zarr/",
    "part-00001.zarr",  # of another part
    "part-00000.zarr\n",
    "part-00000.00.zarr",
    "part-000000.zarr",
    "",
    ".",
    7,
    None,
    ["part-00000.zarr"],
]


@pytest.mark.parametrize("has_checksum", [True, False])
@pytest.mark.parametrize("payload", [*PAYLOADS, "{outside}"])
def test_a_manifest_can_name_only_a_payload_of_its_part(workspace, dataset, outside, payload, has_checksum):
    before = state_of(outside), state_of(dataset.folder / "part-00001.zarr")
    payload = str(outside) if payload == "{outside}" else payload
    forge(dataset.manifest_path(0), has_checksum=has_checksum, payload=payload)
    for read in (dataset.manifest, dataset.arrays, dataset.require_payload):
        with pytest.raises(DamagedPart, match=r"part-00000\.json .*payload"):
            read(0)
    assert [finding.part for finding in verify(workspace, full=True).findings if finding.part] == [("targets", "fused", 0)]
    leftovers(workspace)
    dataset.drop(0)
    assert (state_of(outside), state_of(dataset.folder / "part-00001.zarr")) == before
    assert dataset.parts() == [1]
    assert dataset.read(1, "nll_S")[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "name", ["../../../../outside/secret.txt", "/etc/hostname", "a/../../x", "a//b", "./a", "", "a\\b", "a\0b", "a/\x1b[2J"]
)
def test_a_manifest_can_name_only_files_in_its_payload(workspace, dataset, name):
    manifest = dataset.manifest(0)
    forge(dataset.manifest_path(0), has_checksum=True, files={**manifest.files, name: [4, 0]})
    with pytest.raises(DamagedPart, match=r"part-00000\.json"):
        dataset.manifest(0)
    assert {finding.part for finding in verify(workspace).findings if finding.part} == {("targets", "fused", 0)}


def test_the_names_that_fuseline_gives_are_read(dataset):
    payload = dataset.folder / "part-00000.zarr"
    payload.rename(dataset.folder / "part-00000.12.zarr")
    forge(dataset.manifest_path(0), has_checksum=True, payload="part-00000.12.zarr")
    assert dataset.read(0, "nll_S")[0].tolist() == [0, 1, 2]


def replaced_by_link(path: Path, *, to: Path) -> None:
    """Put a link in the place of a file or folder, which moves to where it leads."""
    if to.exists():
        durable.remove(path)
    else:
        path.rename(to)
    path.symlink_to(to)


@pytest.mark.parametrize("name", ["part-00000.zarr", "part-00000.zarr/zarr.json", "part-00000.zarr/nll_S", "part-00000.zarr/nll_S/c/0"])
def test_what_a_part_consists_of_is_not_read_through_a_link_that_leads_out(workspace, dataset, tmp_path, name):
    replaced_by_link(dataset.folder / name, to=tmp_path / "elsewhere")
    with pytest.raises(DamagedPart, match="is a link that leads out"):
        dataset.read(0, "nll_S")
    assert [finding.part for finding in verify(workspace, full=True).findings if finding.part] == [("targets", "fused", 0)]
    dataset.drop(0)
    assert (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("level", ["targets", "targets/fused"])
def test_a_whole_folder_may_lie_on_another_disk_if_the_user_says_so(workspace, dataset, tmp_path, level, monkeypatch):
    shutil.move(workspace.root / level, tmp_path / "disk")
    (workspace.root / level).symlink_to(tmp_path / "disk")
    for opened in (Workspace.open, Workspace.create):
        with pytest.raises(FuselineError, match=rf"{level} is a link that leads out of .*, set FUSELINE_FOLLOW_LINKS=1"):
            opened(workspace.root)
    monkeypatch.setenv("FUSELINE_FOLLOW_LINKS", "1")
    workspace = Workspace.open(workspace.root)
    (opened,) = workspace.datasets()
    assert opened.read(0, "nll_S")[0].tolist() == [0, 1, 2]
    opened.drop(0)
    opened.commit(0, content=CONTENT, seconds=0)
    with workspace.coordinator():
        assert opened.parts() == [0, 1]
    assert [finding for finding in verify(workspace).findings if finding.part] == []


@pytest.mark.parametrize("level", ["targets", "targets/fused"])
def test_nothing_of_another_workspace_is_removed_through_a_link(workspace, dataset, tmp_path, level):
    mine = shutil.copytree(workspace.root, tmp_path / "mine")
    (mine / "targets" / ".tmp-precious").mkdir()
    for path in (mine / "targets", mine / "targets" / ".tmp-precious"):
        os.utime(path, OLD)
    before = state_of(mine)
    shutil.rmtree(workspace.root / level)
    (workspace.root / level).symlink_to(mine / level)
    (opened,) = workspace.datasets()
    with pytest.raises(DamagedPart, match="is a link into another workspace"):
        opened.drop(0)
    with workspace.coordinator():
        assert opened.parts() == [0, 1]
    assert state_of(mine) == before


@pytest.mark.parametrize(
    "place",
    [
        "targets/fused/part-00000.zarr",  # a payload that a manifest names
        "targets/fused/part-00007.zarr",  # one that none names
        "targets/fused/part-00001.zarr/extra",
        "targets/fused/.tmp-1@x@00@part-00003.zarr",
        "tokenizers/0123",
        "tokenizers",
        "targets/other",
        "models",
    ],
)
def test_gc_and_sweeping_never_follow_a_link(workspace, dataset, outside, place):
    before = state_of(outside)
    (workspace.root / place).parent.mkdir(parents=True, exist_ok=True)
    if (workspace.root / place).exists():
        durable.remove(workspace.root / place)
    (workspace.root / place).symlink_to(outside)
    os.utime(workspace.root / place, OLD, follow_symlinks=False)
    for path in dataset.folder.rglob("part-00001.*"):
        for each in (path, *path.rglob("*")):
            os.utime(each, OLD, follow_symlinks=False)
    delete(workspace, leftovers(workspace))
    with workspace.coordinator():
        pass
    assert state_of(outside) == before
    delete(workspace, leftovers(workspace))
    if "extra" in place or "part-00007" in place or "0123" in place or ".tmp-" in place:
        assert not os.path.lexists(workspace.root / place), "the link itself is a leftover"


def test_gc_leaves_folders_alone_that_are_no_tokenizers(workspace, dataset, outside):
    shutil.copytree(outside / "deep", workspace.root / "tokenizers" / "mine")
    os.utime(workspace.root / "tokenizers" / "mine", OLD)
    os.utime(workspace.root / "tokenizers" / "mine" / "part-00000.zarr", OLD)
    assert leftovers(workspace) == []


@pytest.mark.parametrize(
    "part", [["..", "outside", 0], ["targets", "../../outside", 0], ["targets", "fused", -1], ["targets", "fused", "0"], ["x"]]
)
def test_the_record_of_a_repair_can_name_only_parts(workspace, part):
    (workspace.root / "repair.json").write_text(json.dumps(sealed({"parts": [{"part": part, "files": {}}]})))
    with pytest.raises(DamagedPart, match=r"repair\.json.*Remove it"):
        _interrupted(workspace)


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/hostname", "link"])
def test_the_checksums_of_a_checkpoint_can_name_only_its_files(tmp_path, outside, name):
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    (folder / "weights").write_bytes(b"12")
    (folder / "link").symlink_to(outside / "secret.txt")
    (tmp_path / "secret.txt").write_text("mine")
    seal_checkpoint(folder)
    record = json.loads((folder / "checksums-0.json").read_text())
    (folder / "checksums-0.json").write_text(json.dumps({"weights": record["weights"], name: record["link"]}))
    damage = checkpoint_damage(folder)
    assert damage is not None
    assert "its checksums" in damage


# What lies where a name is expected


def put(kind: str, path: Path, *, outside: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "link":
        path.symlink_to(outside / "secret.txt")
    elif kind == "link to a folder":
        path.symlink_to(outside)
    elif kind == "broken link":
        path.symlink_to(outside / "nothing")
    elif kind == "folder":
        (path / "deep").mkdir(parents=True)
        (path / "deep" / "file").write_text("x")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_text("x" * 50)


KINDS = ["link", "link to a folder", "broken link", "folder", "pipe", "file"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_can_be_taken_whatever_lies_there(tmp_path, outside, kind):
    before = state_of(outside)
    for name in ("file", "made", "link", "lock"):
        put(kind, tmp_path / "w" / name, outside=outside)
    folder = tmp_path / "w"
    durable.write_json(folder / "file", {"a": 1})
    assert json.loads((folder / "file").read_text()) == {"a": 1}
    with durable.temporary(folder / "made") as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("new")
        durable.publish(temporary, to=folder / "made")
    assert [path.name for path in (folder / "made").iterdir()] == ["new"]
    durable.publish_link(folder / "link", to="made")
    assert (folder / "link").readlink() == Path("made")
    with durable.open_lock(folder / "lock") as file:
        file.truncate(0)
        file.write("mine")
    assert (folder / "lock").read_text() == "mine"
    assert not (folder / "lock").is_symlink()
    assert state_of(outside) == before


@pytest.mark.parametrize("kind", KINDS)
def test_temporaries_of_any_kind_are_swept(workspace, dataset, outside, kind):
    before = state_of(outside)
    place = dataset.folder / ".tmp-1@elsewhere@00@part-00003.zarr"
    put(kind, place, outside=outside)
    for path in (place, *place.rglob("*")) if kind == "folder" else (place,):
        os.utime(path, OLD, follow_symlinks=False)
    put(kind, workspace.root / ".coordinator", outside=outside)
    assert durable.is_abandoned(place)
    with workspace.coordinator():
        assert not os.path.lexists(place)
    put(kind, place, outside=outside)
    durable.sweep(dataset.folder, alone=True)
    assert not os.path.lexists(place)
    assert state_of(outside) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_or_payload_of_any_kind_is_reported_and_made_again(workspace, dataset, outside, kind):
    before = state_of(outside)
    durable.remove(dataset.manifest_path(0))
    put(kind, dataset.manifest_path(0), outside=outside)
    durable.remove(dataset.folder / "part-00001.zarr")
    put(kind, dataset.folder / "part-00001.zarr", outside=outside)
    found = {finding.part for finding in verify(workspace, full=True).findings if finding.part}
    assert found == {("targets", "fused", 0), ("targets", "fused", 1)}
    for part in (0, 1):
        dataset.drop(part)
        dataset.commit(part, content=CONTENT, seconds=0)
        assert dataset.read(part, "nll_S")[0].tolist() == [0, 1, 2]
    assert state_of(outside) == before


def test_only_folders_of_a_steps_name_are_checkpoints(tmp_path):
    folder = tmp_path / "checkpoints"
    for name in ("step-00000010", "step-00000200", "step-x", "step-", "step-1", "step-99999999999999999999", "step--0000001"):
        (folder / name).mkdir(parents=True)
    (folder / "step-00000300").write_text("no folder")
    assert checkpoint_steps(tmp_path) == [10, 200]


def test_a_pipe_in_place_of_a_record_is_reported(workspace, dataset):
    for name in ("targets/fused/dataset.json", "runs/1/run.json"):
        path = workspace.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    with pytest.raises(FuselineError, match=r"dataset\.json .*not a regular file"):
        list(workspace.datasets())
    with pytest.raises(FuselineError, match=r"run\.json .*not a regular file"):
        list(workspace.runs())
    assert {finding.path.name for finding in verify(workspace).findings} >= {"dataset.json", "run.json"}
