"""Standard streams as callers leave them: other encodings, closed, full, and pipes that nobody reads to the end."""

import os
import subprocess
import sys

import pytest
from fuseline.store.workspace import Workspace
from support.small import small_workspace

QUERY = "SELECT '“ü” 漢' AS text, 1 AS n"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, byte_level_folder) -> Workspace:
    return small_workspace(tmp_path_factory.mktemp("streams") / "workspace", tokenizer_folder=byte_level_folder)


def shell(command: str, *, workspace: Workspace, **environment: str) -> subprocess.CompletedProcess:
    """Run a command line, in which `fuseline` is this one."""
    full = f'fuseline() {{ "{sys.executable}" -m fuseline "$@"; }}\n{command}'
    known = os.environ | {"W": str(workspace.root), "Q": QUERY} | environment
    return subprocess.run(["bash", "-c", full], capture_output=True, env=known, check=False)


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"PYTHONIOENCODING": "latin-1"}, "?ü? ?".encode("latin-1")),
        ({"PYTHONIOENCODING": "ascii"}, b"??? ?"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, b"??? ?"),
        ({"PYTHONIOENCODING": "utf-8"}, "“ü” 漢".encode()),
    ],
)
def test_what_an_encoding_lacks_is_replaced_in_tables_and_data_stay_utf8(workspace, environment, shown):
    commands = 'fuseline sql "$Q" -w "$W"; echo "exit $?"; fuseline sql "$Q" --format csv -w "$W"; echo "exit $?"'
    result = shell(commands, workspace=workspace, **environment)
    assert shown in result.stdout
    assert "text,n\n“ü” 漢,1\n".encode() in result.stdout
    assert result.stdout.count(b"exit 0") == 2
    assert result.stderr == b""


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ('fuseline sql "$Q" --format csv -w "$W" >&-', 1, b"Error: The standard output is closed"),
        ('fuseline status -w "$W" >&-', 1, b"Error: The standard output is closed"),
        ('fuseline sql "$Q" -w "$W" > /dev/full', 1, b"Error: No space left on device"),
        ('fuseline sql "$Q" -w "$W" <&- 2>&- | grep -q 1', 0, b""),
        ('fuseline sql -w "$W" <&-', 2, b"Error: "),
        ('fuseline sql "SELECT range FROM range(300000)" --format csv -w "$W" | head -n 1; exit ${PIPESTATUS[0]}', 1, b""),
        ('fuseline sql "SELECT range FROM range(900)" -w "$W" | head -n 1; exit ${PIPESTATUS[0]}', None, b""),
        ("fuseline --help >&-", None, b""),
    ],
)
def test_streams_that_are_closed_or_full_give_one_message_at_most(workspace, command, code, message):
    result = shell(command, workspace=workspace)
    assert code is None or result.returncode == code, result.stderr
    assert b"Traceback" not in result.stderr
    assert message in result.stderr
    assert result.stderr.count(b"\n") <= 4


def test_a_file_gets_the_bytes_of_its_own_number(workspace, tmp_path):
    """What prints to a closed output must not write into the file that is opened next."""
    path = tmp_path / "a.csv"
    result = shell(f'fuseline sql "$Q" --stats -w "$W" -o "{path}" >&- 2>&-', workspace=workspace)
    assert result.returncode == 0
    assert path.read_text() == "text,n\n“ü” 漢,1\n"
