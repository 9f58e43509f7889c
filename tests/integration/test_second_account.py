"""What another account of the machine may do with a workspace that it can read and not write: ask it, and nothing else."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.small import small_workspace

NOBODY = 65_534
# An account that cannot read the Python that runs: what the command imports is imported before, by running it on a copy.
AS_NOBODY = f"""
import os, sys
from click.testing import CliRunner
from fuseline.cli import main
copy, shared, *arguments = sys.argv[1:]
CliRunner().invoke(main, [*arguments, "-w", copy])
CliRunner().invoke(main, ["no-command"])
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
os.environ["HOME"] = "/nonexistent"
os.chdir("/")
main([*arguments, "-w", shared])
"""


def as_nobody(workspace: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(workspace, Path(folder) / "copy")
        command = [sys.executable, "-P", "-c", AS_NOBODY, str(copy), str(workspace), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def shared(byte_level_folder) -> Iterator[Path]:
    """A workspace in a folder that everybody can read."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as another account")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        yield small_workspace(folder / "workspace", tokenizer_folder=byte_level_folder).root
    finally:
        shutil.rmtree(folder)


def state(folder: Path) -> dict[str, tuple[int, str]]:
    """Mode and digest of everything in a folder."""
    paths = sorted(folder.rglob("*"))
    return {str(path): (path.stat().st_mode, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "") for path in paths}


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["status"], "distributions/"),
        (["sql", "SELECT count(*) AS n_datasets FROM datasets", "--format", "csv"], "n_datasets\n6\n"),
        (["sql", "SELECT count(*) > 0 AS found FROM positions", "--format", "csv"], "found\ntrue\n"),
        (["store", "verify", "--full"], "no problems"),
        (["store", "du"], "total"),
        (["store", "gc"], "Nothing to do"),
    ],
)
def test_who_can_read_can_ask(shared, arguments, shown):
    before = state(shared)
    found = as_nobody(shared, *arguments)
    assert found.returncode == 0, found.stderr
    assert shown in found.stdout
    assert state(shared) == before


@pytest.mark.parametrize("arguments", [["store", "rebuild"], ["store", "gc", "--delete"]])
def test_who_cannot_write_changes_nothing(shared, arguments):
    before = state(shared)
    found = as_nobody(shared, *arguments)
    assert found.returncode == 1
    assert found.stderr.startswith("Error: ")
    assert "cannot be written: Permission denied" in found.stderr
    assert "Traceback" not in found.stderr
    assert state(shared) == before


def test_a_file_that_cannot_be_read_is_named(shared):
    secret = next(shared.glob("distributions/*/part-00000.json"))
    mode = secret.stat().st_mode
    secret.chmod(0o600)
    try:
        found = as_nobody(shared, "store", "verify")
        assert found.returncode == 1
        assert str(secret) in found.stdout + found.stderr
        assert "Permission denied" in found.stdout + found.stderr
    finally:
        secret.chmod(mode)
