"""What strangers wrote reaches the terminal as text."""

import io
import re
import sys

import pytest
import rich.box
import rich.table
import rich.text
from fuseline.commands import terminal
from fuseline.pipeline.rich_console import Console
from fuseline.store.shown import harmless
from hypothesis import example, given
from hypothesis import strategies as st

TITLE = "\x1b]0;a new title\x07"  # of the window
CLEAR = "\x1b[2J\x1b[H"
HOSTILE = (TITLE, CLEAR, "\x9b2J", "safe\rforged", "back\b\b\bspace", "\x7f", "\u202egnp.exe", "\u2066x\u2069", "a\u2028b", "\x1b[8mhidden")


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@given(st.text(st.characters(codec="utf-8")))
@example("\x1b[31m")
def test_nothing_controls_the_terminal_and_ordinary_text_stays(text):
    shown = harmless(text)
    assert all(
        char.isprintable() or char in "\n\t" or not re.match(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", char) for char in shown
    )
    assert harmless(shown) == shown
    plain = "".join(char for char in text if char.isprintable() or char == "\n")
    assert harmless(plain) == plain
    assert "\n" not in harmless(text, one_line=True)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_said_holds_no_command(text, capsys):
    terminal.say(text)
    terminal.say(text, err=True, end="")
    out, err = capsys.readouterr()
    assert out == f"{harmless(text)}\n"
    assert err == harmless(text) != text


@pytest.mark.parametrize("text", HOSTILE)
def test_a_console_writes_its_own_styles_and_no_others(text):
    screen = Screen()
    console = Console(screen, width=100)
    console._force_terminal = True
    text = f"a {text}"
    table = rich.table.Table(text, box=rich.box.SIMPLE_HEAD)
    table.add_row(text)
    table.add_row(rich.text.Text(text, style="bold red"))
    console.print(table)
    console.print(text, style="bold", soft_wrap=True)
    written = screen.getvalue()
    assert "\x1b[1;31m" in written
    left = re.sub(r"\x1b\[[0-9;]*m", "", written)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", left)
    assert "\x1b[8m" not in written


def test_bytes_are_harmless_on_a_terminal_and_untouched_elsewhere(monkeypatch):
    pipe = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", pipe)
    terminal.binary_output().write(CLEAR.encode())
    assert pipe.buffer.getvalue() == CLEAR.encode()
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    assert terminal.binary_output().write(CLEAR.encode()) == len(CLEAR)
    assert screen.getvalue() == r"\x1b[2J\x1b[H"


def test_everything_is_shown_at_this_edge():
    """No module writes to the standard streams by itself; ranks and tasks of Slurm, whose output goes to files, may."""
    from pathlib import Path

    root = Path(terminal.__file__).parents[1]
    may = {"commands/terminal.py", "train/launch.py", "train/rank.py", "train/trainer.py", "pipeline/executors/slurm.py"}
    modules = [
        path
        for folder in ("", "store", "ingest", "align", "train", "eval", "pipeline", "commands")
        for path in (root / folder).glob("**/*.py" if folder else "*.py")
    ]
    writers = {
        path.relative_to(root).as_posix()
        for path in modules
        if re.search(r"click\.echo\(|(?<!\.)\bprint\(|rich\.console\.Console\(", path.read_text())
    }
    assert writers <= may
