"""The interactive prompt, typed into through a pipe."""

import pytest
from fuseline.commands.prompt import ask_repeatedly, history_file
from fuseline.store.errors import UsageError
from fuseline.store.workspace import Workspace
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from support.stores import build_store


@pytest.fixture
def database(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    build_store(tmp_path / "w", seed=2)
    return Workspace.open(tmp_path / "w").database


def typed(database, text: str, *, stats: bool = False, fails: bool = False) -> tuple[list[str], list[int]]:
    """The statements that were run, and after how many of them stats were shown."""
    asked: list[str] = []
    shown: list[int] = []

    def show(statement: str) -> None:
        asked.append(statement)
        if fails:
            raise UsageError("no such table")
        database.sql(statement)

    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text(text)
        ask_repeatedly(database, show=show, show_stats=lambda: shown.append(len(asked)), stats=stats)
    return asked, shown


def test_statements_of_several_lines_history_and_stats(database):
    asked, shown = typed(database, "SELECT 1\n  AS one;\n.stats on\nSELECT count(*) FROM positions;\n.stats off\nSELECT 2;\n.exit\n")
    assert asked == ["SELECT 1\n  AS one;", "SELECT count(*) FROM positions;", "SELECT 2;"]
    assert shown == [2]
    assert "SELECT count(*) FROM positions;" in history_file().read_text()
    again, _ = typed(database, "\x1b[A\x1b[A\n\x04")  # two up: what was asked last but .exit
    assert again == ["SELECT 2;"]


def test_a_mistake_is_shown_and_the_prompt_goes_on(database, capsys):
    asked, shown = typed(database, "SELECT 1;\nSELECT 2;\n\x04", stats=True, fails=True)
    assert len(asked) == 2
    assert shown == []
    assert capsys.readouterr().err.count("no such table") == 2


def test_tables_and_help(database, capsys):
    typed(database, ".tables\n.help\nexit\n")
    output = capsys.readouterr().out
    assert "distributions(model, corpus, domain" in output
    assert "target_segments(" in output
    assert ".stats on|off" in output


def test_names_are_completed(database):
    from fuseline.commands.prompt import _completer

    def completions(text: str) -> list[str]:
        return [found.text for found in _completer(database).get_completions(Document(text), CompleteEvent())]

    assert "positions" in completions("SELECT * FROM pos")
    assert "gold_logprob" in completions("select gold_l")
