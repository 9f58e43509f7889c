"""Which SQL may be run: a single statement that only reads. With external access, a result may also be copied to a file.

The catalog is opened read-only, but DuckDB lets any statement write the files of the open database, and since version 2 a `WITH` clause
may hold statements that write. So the type of the statement and its clauses are checked.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import duckdb

from ..errors import UsageError
from ..output_file import require_outside_workspaces

_TYPES = duckdb.StatementType
_READING_NODES = frozenset({"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"})
_RUNS_TEXT = frozenset({"query", "query_table", "json_execute_serialized_sql"})  # functions that run a text as a query
_WRITING = frozenset({"attach", "call", "copy", "create", "delete", "drop", "insert", "install", "load", "merge", "update"})
_MAY_HIDE = re.compile(r"with|query|serialized", re.IGNORECASE)  # a query without these words needs no check
_NODE = re.compile(r'"type":"(\w+_NODE)"')  # inside a text, the quotes are escaped
_FUNCTION = re.compile(r'"function_name":"(\w+)"')
_ONLY_READS = "Only statements that read can be run: SELECT, FROM, WITH, VALUES, PIVOT, DESCRIBE, SUMMARIZE, SHOW, and EXPLAIN of these"


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement that may be run."""

    text: str
    asks: str | None  # the query in it that `require_no_writing` checks


def checked(query: str, *, external_access: bool, workspace: Path) -> Statement:
    """The statement of a query, if it may be run.

    Raises:
        UsageError: there is no statement or more than one, it is invalid, or it does more than read.
    """
    asked = query
    type_ = _type_of(query)
    if type_ == _TYPES.EXPLAIN:
        asked = _explained(query)
        type_ = _type_of(asked)
        if type_ not in {_TYPES.SELECT, _TYPES.MULTI}:
            raise UsageError(f"{_ONLY_READS}.")
    if type_ == _TYPES.SELECT:
        return Statement(query, asked)
    if type_ == _TYPES.MULTI and any(token.text.lower().startswith("pivot") for token in _tokens(asked)):
        _require_no_hidden(asked)
        return Statement(query, None)
    if type_ == _TYPES.COPY and external_access:
        _require_no_hidden(query)
        _require_target_outside(query, workspace=workspace)
        return Statement(query, None)
    if type_ == _TYPES.COPY:
        raise UsageError(f"{_ONLY_READS}. To write a result to a file, use `fuseline sql -o FILE`.")
    also = "; with external access also COPY (SELECT …) TO 'FILE'" if external_access else ""
    raise UsageError(f"{_ONLY_READS}{also}.")


def require_no_writing(connection: duckdb.DuckDBPyConnection, statement: Statement) -> None:
    """Raise UsageError if a clause of a query holds a statement that writes, or a function that runs a text as a query."""
    if statement.asks is None or not _MAY_HIDE.search(statement.asks):
        return
    ((text,),) = connection.execute("SELECT system.main.json_serialize_sql($query::VARCHAR)", {"query": statement.asks}).fetchall()
    if json.loads(text)["error"]:
        raise UsageError(f"The query failed: {json.loads(text)['error_message']}")
    writing = sorted(set(_NODE.findall(text)) - _READING_NODES)
    if writing:
        raise UsageError(f"{_ONLY_READS}. A clause of the query holds another one ({writing[0].split('_')[0]}).")
    running = sorted({name.lower() for name in _FUNCTION.findall(text)} & _RUNS_TEXT)
    if running:
        raise UsageError(f"The function {running[0]} is not available here. Write out its query.")


def _type_of(query: str) -> object:
    """The type of a query's single statement; None if duckdb's Python has no name for it."""
    try:
        query.encode()
        statements = duckdb.extract_statements(query)
        if len(statements) != 1:
            raise UsageError("QUERY must be one statement.")
        return statements[0].type
    except UnicodeEncodeError as error:
        raise UsageError(f"The query is not valid UTF-8: {error}.") from error
    except duckdb.Error as error:
        raise UsageError(f"The query failed: {error}") from error
    except (ValueError, RecursionError):
        return None


@dataclass(frozen=True, slots=True)
class _Token:
    start: int
    text: str
    is_text: bool  # a string constant


def _tokens(query: str) -> list[_Token]:
    """The tokens of a statement without comments; offsets count bytes, as DuckDB's do."""
    data = query.encode()
    found = duckdb.tokenize(query)
    ends = [start for start, _ in found[1:]] + [len(data)]
    return [
        _Token(start, data[start:end].decode(errors="replace").strip(), kind == duckdb.token_type.string_const)
        for (start, kind), end in zip(found, ends, strict=True)
        if kind != duckdb.token_type.comment
    ]


def _explained(query: str) -> str:
    """The statement that an EXPLAIN explains; with ANALYZE it is also run."""
    data, tokens = query.encode(), _tokens(query)[1:]
    if tokens and tokens[0].text.lower() in {"analyze", "analyse"}:
        return data[tokens[1].start :].decode() if len(tokens) > 1 else ""
    if tokens and tokens[0].text == "(" and _is_query(rest := data[tokens[0].start :].decode()):
        return rest  # EXPLAIN (SELECT …)
    if tokens and tokens[0].text == "(":  # EXPLAIN (FORMAT json) SELECT …
        end = next((place for place, token in enumerate(tokens) if token.text == ")"), len(tokens) - 1)
        tokens = tokens[end + 1 :]
    return data[tokens[0].start :].decode() if tokens else ""


def _require_no_hidden(query: str) -> None:
    """As `require_no_writing`, for statements that DuckDB cannot describe: checks their words, and may refuse too much."""
    before = ""
    for token in _tokens(query):
        word = token.text.strip('"').lower()
        if (before == "(" and word in _WRITING) or word in _RUNS_TEXT:
            raise UsageError(f"{_ONLY_READS}. {token.text} is not allowed here.")
        before = token.text


def _is_query(text: str) -> bool:
    try:
        return _type_of(text) == _TYPES.SELECT
    except UsageError:
        return False


def _require_target_outside(query: str, *, workspace: Path) -> None:
    """Raise UsageError unless a COPY writes to a file that is given as a plain text and lies outside all workspaces."""
    depth, tokens = 0, _tokens(query)
    for token, after in zip(tokens, [*tokens[1:], _Token(0, "", is_text=False)], strict=True):
        depth += token.text.count("(") - token.text.count(")") if not token.is_text else 0
        if depth == 0 and token.text.lower() == "to":
            if not after.is_text or not re.fullmatch(r"'(?:[^']|'')*'", after.text):
                break
            target = Path(after.text[1:-1].replace("''", "'"))
            require_outside_workspaces(target, what="COPY … TO")
            if workspace.resolve().is_relative_to(target.absolute().resolve()):
                raise UsageError(f"COPY … TO ({target}) is a folder that contains the workspace {workspace}. Choose another path.")
            return
    raise UsageError("COPY must be COPY (SELECT …) TO 'FILE', with the name of the file as a plain text.")
