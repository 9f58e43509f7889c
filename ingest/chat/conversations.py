"""Converts conversations of data sets to one form: a tuple of messages, each with a role and a text.

messages    [{"role": "user", "content": "…"}, …], as in chat APIs; content may be a list of text parts
sharegpt    [{"from": "human", "value": "…"}, …]
alpaca      columns instruction, input (may be empty or missing) and output, one exchange per row; a column system is read too
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...store.errors import DataError

ConversationFormat = Literal["messages", "alpaca"]
Role = Literal["system", "user", "assistant", "tool"]
_ROLES: dict[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
_LISTS = ("messages", "conversations", "conversation")  # columns that hold lists of messages
_ALPACA, _ALPACA_OPTIONAL = ("instruction", "output"), ("input", "system")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    text: str


Conversation = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class ConversationReader:
    """Which columns hold the conversations of a data set, and in which format."""

    required: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Conversation]  # raises ValueError with the problem of a row
    optional: tuple[str, ...] = ()  # columns that may be missing


def find_reader(columns: Sequence[str], *, wanted: ConversationFormat | None, column: str | None, where: str) -> ConversationReader:
    """How to read a data set with these columns.

    Args:
        columns: names of the data set's columns.
        wanted: the format; None to detect it from the columns' names.
        column: the column with the lists of messages; None to look for one.
        where: the data set, for messages.

    Raises:
        DataError: no column holds conversations.
    """
    lists = [name for name in ((column,) if column else _LISTS) if name in columns]
    if lists and wanted != "alpaca":
        return ConversationReader((lists[0],), lambda row: read_messages(row[lists[0]]))
    if not column and wanted in (None, "alpaca") and set(_ALPACA) <= set(columns):
        return ConversationReader(_ALPACA, read_alpaca, optional=_ALPACA_OPTIONAL)
    looked_for = column or f"{', '.join(_LISTS)}, or instruction and output"
    raise DataError(
        f"{where} has no conversations: its columns are {', '.join(columns)}, not {looked_for}. "
        "Name the column with corpus.chat.column, or remove [corpus.chat] if this is plain text."
    )


def read_messages(value: Any) -> Conversation:
    """A list of messages.

    Raises:
        ValueError: it is invalid; the text names the message and the field.
    """
    if isinstance(value, Mapping):  # a list of structs may be read as a struct of lists
        columns = {key: fields or () for key, fields in value.items()}
        if len({len(fields) for fields in columns.values()}) > 1:
            raise ValueError(f"the lists {', '.join(columns)} have different lengths")
        value = [dict(zip(columns, fields, strict=True)) for fields in zip(*columns.values(), strict=True)]
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"is {_kind(value)}, not a list of messages")
    return tuple(_message(message, number=number) for number, message in enumerate(value, start=1))


def read_alpaca(row: Mapping[str, Any]) -> Conversation:
    """An instruction with its input and output as one exchange.

    Raises:
        ValueError: a field is not text.
    """
    fields = {name: _text(row.get(name), field=name) for name in (*_ALPACA, *_ALPACA_OPTIONAL)}
    asked = "\n\n".join(text for text in (fields["instruction"], fields["input"]) if text)
    found = [Message("user", asked), Message("assistant", fields["output"])] if asked and fields["output"] else []
    return tuple([Message("system", fields["system"]), *found] if fields["system"] and found else found)


def _message(message: Any, *, number: int) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number} is {_kind(message)}, not an object with a role and a text")
    named = message.get("role") or message.get("from")  # rows may have the keys of other rows as null
    role = _ROLES.get(named.lower()) if isinstance(named, str) else None
    if role is None:
        raise ValueError(f"message {number}: the role ({named!r}) must be one of {', '.join(sorted(_ROLES))}")
    for key in ("tool_calls", "reasoning_content", "thinking"):
        if message.get(key):
            raise ValueError(f"message {number} has {key}, which is not supported; write it into the message's text")
    if message.get("weight") == 0:
        raise ValueError(f"message {number} has weight 0, but all answers are trained on; end the conversation before it")
    content = message.get("value") if message.get("content") is None else message["content"]
    if isinstance(content, Sequence) and not isinstance(content, str):
        return Message(role, "".join(_part(part, number=number) for part in content))
    return Message(role, _text(content, field=f"message {number}"))


def _part(part: Any, *, number: int) -> str:
    if not isinstance(part, Mapping) or part.get("type", "text") != "text":
        raise ValueError(f"message {number} has a part that is not text ({part!r:.60})")
    return _text(part.get("text"), field=f"message {number}")


def _text(value: Any, *, field: str) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{field}: the text is {_kind(value)}")
    text = value or ""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{field}: the text is not valid Unicode ({error})") from error
    return text


def _kind(value: Any) -> str:
    return f"of type {type(value).__name__}"
