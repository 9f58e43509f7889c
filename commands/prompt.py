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
End a statement with ; and press Enter. Tab completes names, the up arrow recalls earlier statements.
.tables           tables and their columns
.stats on|off     show after each query what was read
.exit             exit (or Ctrl-D)"""


def history_file() -> Path:
    """The file that keeps statements between sessions."""
    state = Path(os.environ.get("XDG_STATE_HOME") or expanded("~/.local/state"))
    return state / "fuseline" / "sql_history"


def ask_repeatedly(database: Database, *, show: Callable[[str], None], show_stats: Callable[[], None], stats: bool) -> None:
    """Read statements and show their results until the user exits. Between two statements the catalog is not locked.

    Args:
        database: the database to query.
        show: runs a statement and shows its result.
        show_stats: shows what the last statement read.
        stats: whether to show the statistics from the start.
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
    say(f"{database.layout.root}: SQL over all stored data. Type .help for help.")
    while True:
        try:
            text = session.prompt().strip()
        except KeyboardInterrupt:
            continue  # drops the line, like a shell
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
                say(f"Unknown command: {text}.\n{_HELP}", err=True)
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
        path.parent.chmod(0o700)  # queries may contain private text
        path.touch(0o600)
        path.chmod(0o600)
    except OSError as error:
        say(f"{path} cannot be written ({error.strerror}): statements of this session are not kept.", err=True)
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
