"""What strangers may do to a training: reach its ports, and hand it a checkpoint, a job, or a folder to start in."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

import psutil
import pytest
import torch
from fuseline.store.errors import DataError, FuselineError
from fuseline.store.trainings import checkpoint_folder, read_metrics, seal_checkpoint
from fuseline.train.config import TrainJob
from fuseline.train.meeting import MEETING
from support.trainings import make_job, start_and_wait, train, write_inputs
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

NOBODY = 65_534
KNOCK = """
import pickle, socket, sys
for port in map(int, sys.argv[1:]):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(pickle.dumps({"store": 1}) + bytes(range(256)) * 64)
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def touch(path: Path) -> object:
    """An object whose unpickling makes a file."""

    class Touch:
        def __reduce__(self):
            return Path.touch, (path,)

    return Touch()


def listeners(processes: list[psutil.Process]) -> list[tuple[str, int]]:
    found = [connection for process in processes for connection in process.net_connections("inet")]
    return [tuple(connection.laddr) for connection in found if connection.status == psutil.CONN_LISTEN]


@pytest.mark.skipif(sys.platform != "linux", reason="ports by process are read from /proc")
def test_ranks_on_one_machine_listen_on_loopback_alone_and_bear_whoever_knocks(inputs, tmp_path, monkeypatch, cold):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "a-cluster's-profile-names-another")
    job = make_job(inputs, tmp_path / "run", steps=5000, checkpoint_every=5000, data_parallel=2)
    process = start_and_wait(job, until_step=1)
    try:
        launcher = psutil.Process(process.pid)
        ranks = [each for each in launcher.children() if MEETING in each.environ()]
        assert len(ranks) == 2
        found = listeners([launcher, *launcher.children(recursive=True)])
        assert found
        assert {address for address, _ in found} <= {"127.0.0.1", "::1"}
        meeting = Path(ranks[0].environ()[MEETING])
        assert meeting.parent.stat().st_mode & 0o777 == 0o700
        somebody = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
        if somebody:
            with pytest.raises(subprocess.CalledProcessError):
                subprocess.run(["cat", meeting], check=True, capture_output=True, **somebody)
        ports = [str(port) for _, port in found]
        subprocess.run(["/usr/bin/env", "python3", "-c", KNOCK, *ports], check=True, timeout=60, cwd="/", **somebody)
        reached = len(read_metrics(job.run_folder))
        deadline = time.monotonic() + 60
        while len(read_metrics(job.run_folder)) < reached + 5:
            assert process.poll() is None, (job.run_folder / "launcher.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory) -> TrainJob:
    """A finished run; it was started in a folder of a stranger's."""
    folder = tmp_path_factory.mktemp("theirs")
    for name in ("torch", "numpy", "fuseline", "json"):
        (folder / f"{name}.py").write_text("raise SystemExit('a stranger's module was imported')")
    job = make_job(inputs, tmp_path_factory.mktemp("runs") / "run", steps=2, checkpoint_every=1)
    before = Path.cwd()
    os.chdir(folder)
    try:
        train(job)
    finally:
        os.chdir(before)
    return job


def hostile(job: TrainJob, run_folder: Path) -> tuple[TrainJob, Path]:
    """The same training before its second step, and the checkpoint that it will go on from."""
    checkpoint = checkpoint_folder(run_folder, step=1)
    shutil.copytree(checkpoint_folder(job.run_folder, step=1), checkpoint)
    return job.model_copy(update={"run_folder": run_folder, "export_folder": run_folder / "export"}), checkpoint


def sealed_again(checkpoint: Path) -> None:
    (checkpoint / "checksums-0.json").unlink()
    seal_checkpoint(checkpoint)


def elsewhere(description: Metadata) -> Metadata:
    """The same description with its tensors in a file outside the folder."""
    place = next(iter(description.storage_data.values()))
    object.__setattr__(place, "relative_path", "../../elsewhere.distcp")
    return description


@pytest.mark.parametrize("name", [".metadata", "common.pt", "elsewhere", "pipe"])
def test_a_checkpoint_runs_no_code_and_reads_nothing_outside_its_folder(trained, tmp_path, name):
    job, checkpoint = hostile(trained, tmp_path / "run")
    marker = tmp_path / "ran"
    if name == "common.pt":
        torch.save(touch(marker), checkpoint / name)
        reason = "cannot be read"
    elif name == "pipe":
        (checkpoint / "common.pt").unlink()
        os.mkfifo(checkpoint / "common.pt")
        (checkpoint / "extra.distcp").symlink_to("/etc/passwd")
        reason = r"\((common\.pt|extra\.distcp) is (missing|not in its checksums)\)"
    else:
        path = checkpoint / ".metadata"
        description = pickle.loads(path.read_bytes())
        shutil.copy(next(checkpoint.glob("*.distcp")), tmp_path / "elsewhere.distcp")
        path.write_bytes(pickle.dumps(touch(marker) if name == ".metadata" else elsewhere(description)))
        reason = {".metadata": r"it holds pathlib\.Path", "elsewhere": r"it names the file '\.\./\.\./elsewhere\.distcp'"}[name]
    if name != "pipe":
        sealed_again(checkpoint)
    with pytest.raises(FuselineError, match=reason) as caught:
        train(job)
    assert str(caught.value).startswith(f"The checkpoint {checkpoint} cannot be read")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("key", "value"), [("export_folder", "{outside}"), ("run_folder", "{outside}"), ("export_folder", "{run}/../other")]
)
def test_a_job_that_writes_outside_its_workspace_is_refused(trained, tmp_path, key, value):
    run, outside = tmp_path / "runs" / "fused", tmp_path / "outside"
    run.mkdir(parents=True)
    outside.mkdir()
    job = trained.model_copy(update={"run_folder": run, "export_folder": tmp_path / "exports" / "fused"})
    job.save()
    assert TrainJob.load(run) == job
    record = json.loads((run / "job.json").read_text())
    record[key] = value.format(outside=outside, run=run)
    (run / "job.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match="is the job of another folder"):
        TrainJob.load(run)


def test_messages_of_ranks_run_no_code(tmp_path):
    """What `torch.distributed` unpickles of another rank's, inside a runtime."""
    from fuseline.train.unpickling import known_classes_only
    from torch.distributed import distributed_c10d

    with known_classes_only():
        for message in (MetadataIndex("weight"), {"a": [1, torch.float32]}, ValueError("told"), torch.Size([2])):
            tensor, size = distributed_c10d._object_to_tensor(message, torch.device("cpu"), None)
            assert repr(distributed_c10d._tensor_to_object(tensor, size, None)) == repr(message)
        for evil in (touch(tmp_path / "ran"), os.system, {"x": subprocess.Popen}):
            tensor, size = distributed_c10d._object_to_tensor(evil, torch.device("cpu"), None)
            with pytest.raises(pickle.UnpicklingError, match="which is not in any checkpoint of fuseline"):
                distributed_c10d._tensor_to_object(tensor, size, None)
    assert not (tmp_path / "ran").exists()
    assert distributed_c10d._unpickler is pickle.Unpickler


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x80\x04Nr\xff\xff\xff\x0f.", "it has an object with number 268,435,455, but only 9 bytes"),
        (pickle.dumps(subprocess.Popen), "it holds subprocess.Popen"),
        (pickle.dumps(os.system), "it holds posix.system"),
    ],
)
def test_the_description_of_a_checkpoint_is_bounded(data, reason):
    from fuseline.train.unpickling import _read_description

    with pytest.raises(pickle.UnpicklingError, match=reason):
        _read_description(io.BytesIO(data))


def test_the_error_of_another_rank_reads_no_file(tmp_path):
    from fuseline.train.unpickling import KnownClasses

    (tmp_path / "secret.txt").write_text("a password\n")
    sent = pickle.dumps(traceback.FrameSummary("x", 1, "f")).replace(b"\x8c\x01x", b"\x8c\x01y")
    assert KnownClasses(io.BytesIO(sent)).load().line == ""

    class Reads:
        def __reduce__(self):
            return traceback.FrameSummary, (str(tmp_path / "secret.txt"), 1, "f")

    found = KnownClasses(io.BytesIO(pickle.dumps(Reads()))).load()
    assert "a password" not in repr(vars(found)) + str(found.line)
