"""Whatever happens in the middle of a commit, what was committed stays, and the part is absent or whole. See `support/crashes.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "crashes.py"


def struck(folder: Path, fault: str, kind: str) -> tuple[int, int]:
    done = subprocess.run([sys.executable, SCRIPT, folder / "kind" / "name", fault, kind], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    n_struck, n_there = json.loads(done.stdout)
    return n_struck, n_there


@pytest.mark.parametrize(("kind", "least"), [("arrays", 60), ("table", 15)])
def test_a_worker_is_killed_before_every_system_call(tmp_path, kind, least):
    n_struck, n_there = struck(tmp_path, "kill", kind)
    assert n_struck >= least
    assert 0 < n_there < n_struck, "the manifest must appear at a call in between"


@pytest.mark.parametrize(("kind", "least"), [("arrays", 40), ("table", 160)])
def test_a_worker_is_killed_at_random_moments(tmp_path, kind, least):
    n_struck, n_parts = struck(tmp_path, "random", kind)
    assert n_struck >= least
    assert n_parts > 10


@pytest.mark.parametrize(("kind", "least"), [("arrays", 35), ("table", 8)])
def test_the_disk_is_full_at_every_call_that_takes_room(tmp_path, kind, least):
    n_struck, n_tried_again = struck(tmp_path, "full", kind)
    assert n_struck >= least
    assert n_tried_again < n_struck / 4


@pytest.mark.parametrize(("kind", "least"), [("arrays", 15), ("table", 10)])
@pytest.mark.parametrize("fault", ["same", "other"])
def test_a_second_worker_commits_the_same_part_within_every_call(tmp_path, fault, kind, least):
    n_struck, n_second = struck(tmp_path, fault, kind)
    assert n_struck >= least
    assert n_second == n_struck if fault == "same" else 0 < n_second < n_struck
