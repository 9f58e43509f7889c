"""The interactive SQL prompt: history, completion of table and column names, statements of several lines."""

import os
from collections.abc import Callable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent
from prompt_toolkit.lexers import PygmentsLexer
from pygments.lexers.sql import SqlLexer

from ..store.errors import FuselineError
from ..store.paths import expanded
from ..store.sql.database import Database
from .terminal import say

_KEYWORDS = """
    SELECT FROM WHERE GROUP BY ALL ORDER LIMIT JOIN LEFT USING ON AND OR NOT IN BETWEEN LIKE IS NULL AS DISTINCT HAVING WITH CASE WHEN THEN
    ELSE END UNION DESC ASC OVER PARTITION QUALIFY DESCRIBE SUMMARIZE EXPLAIN ANALYZE
    count avg sum min max median quantile_cont exp ln unnest list_contains"""
_HELP = """\
End a statement with ; and press Enter. Tab completes names, the up arrow brings back what was asked before.
.tables           tables and their columns
.stats on|off     say after each query what was read
.exit             leave (or Ctrl-D)"""


def history_file() -> Path:
    """Where what was asked is kept between sessions."""
    state = Path(os.environ.get("XDG_STATE_HOME") or expanded("~/.local/state"))
    return state / "fuseline" / "sql_history"


def ask_repeatedly(database: Database, *, show: Callable[[str], None], show_stats: Callable[[], None], stats: bool) -> None:
    """Read statements and show their results until the user leaves. Between two statements the catalog is not held.

    Args:
        database: what is asked.
        show: runs a statement and shows its result.
        show_stats: shows what the last one read.
        stats: whether to, from the beginning.
    """
    session: PromptSession[str] = PromptSession(
        "fuseline> ",
        completer=_completer(database),
        history=_history(history_file()),
        key_bindings=_bindings(),
        lexer=PygmentsLexer(SqlLexer),
        multiline=True,
        prompt_continuation="      ... ",
    )
    say(f"{database.layout.root}: SQL over everything that is stored; .help says more.")
    while True:
        try:
            text = session.prompt().strip()
        except KeyboardInterrupt:
            continue  # drops the line, as shells do
        except EOFError:
            return
        match text.rstrip(";").split():
            case []:
                continue
            case [".exit" | ".quit" | "exit" | "quit"]:
                return
            case [".tables"]:
                for table, columns in database.tables().items():
                    say(f"{table}({', '.join(columns)})")
            case [".stats", "on" | "off" as wanted]:
                stats = wanted == "on"
            case [".help"]:
                say(_HELP)
            case [first, *_] if first.startswith("."):
                say(f"{text} is no command of the prompt.\n{_HELP}", err=True)
            case _:
                try:
                    show(text)
                except FuselineError as error:
                    say(f"Error: {error}", err=True)
                except KeyboardInterrupt:
                    say("Stopped.", err=True)
                else:
                    if stats:
                        show_stats()


def _history(path: Path) -> History:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o700)  # queries may hold what nobody else should read
        path.touch(0o600)
        path.chmod(0o600)
    except OSError as error:
        say(f"{path} cannot be written ({error.strerror}): what is asked here is not kept for the next session.", err=True)
        return InMemoryHistory()
    return FileHistory(str(path))


def _completer(database: Database) -> Completer:
    tables = database.tables()
    columns = {column for names in tables.values() for column in names}
    return WordCompleter([*tables, *sorted(columns), *_KEYWORDS.split()], ignore_case=True)


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        text = event.current_buffer.text.strip()
        if not text or text.endswith(";") or text.startswith(".") or text in {"exit", "quit"}:
            event.current_buffer.validate_and_handle()
        else:
            event.current_buffer.insert_text("\n")

    return bindings
