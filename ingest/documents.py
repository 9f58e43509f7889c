"""Reads the documents of a corpus: a column of text, or conversations that a chat template renders."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from ..store.errors import DataError
from .chat.config import ChatConfig
from .chat.conversations import Conversation, find_reader
from .chat.marked_text import MarkedText
from .chat.sandbox import EndlessTemplate
from .chat.template import ChatTemplate, RefusedConversation
from .rows import Rows


class Documents(Protocol):
    """Reads rows of a file as documents."""

    @property
    def required(self) -> Sequence[str]:
        """Columns that the file must have."""
        ...

    @property
    def optional(self) -> Sequence[str]:
        """Columns that are read if the file has them."""
        ...

    def read(self, rows: Rows) -> tuple[list[MarkedText], Mapping[int, str]]:
        """The documents of some rows, and the reasons for refused ones by index; refused documents have no text.

        Raises:
            DataError: a row is invalid; the text says where, and what to do.
        """
        ...


class TextDocuments:
    """A column of text."""

    optional: Sequence[str] = ()

    def __init__(self, column: str) -> None:
        self.required: Sequence[str] = (column,)

    def read(self, rows: Rows) -> tuple[list[MarkedText], Mapping[int, str]]:
        """Null is an empty text; invalid Unicode, such as a lone surrogate, is an error."""
        (column,) = self.required
        return [MarkedText(text=_text(value, place=rows.place, index=index)) for index, value in enumerate(rows.columns[column])], {}


class ChatDocuments:
    """Conversations, rendered by a chat template."""

    def __init__(self, config: ChatConfig, *, template: ChatTemplate, columns: Sequence[str], where: str) -> None:
        """Find the columns that hold the conversations.

        Raises:
            DataError: there are none.
        """
        self._template = template
        self._reader = find_reader(columns, wanted=config.format, column=config.column, where=where)
        self.required, self.optional = self._reader.required, self._reader.optional

    def read(self, rows: Rows) -> tuple[list[MarkedText], Mapping[int, str]]:
        """Conversations without an answer, with an empty one, or that the template cannot render unchanged are refused."""
        found: dict[int, MarkedText | RefusedConversation] = {}
        conversations: dict[int, Conversation] = {}
        columns = (*self.required, *self.optional)
        for index, values in enumerate(zip(*(rows.columns[column] for column in columns), strict=True)):
            fields = dict(zip(columns, values, strict=True))
            try:
                conversation = self._reader.read(fields)
            except ValueError as error:
                raise DataError(f"{rows.place(index)}, {', '.join(columns)}: {error}. Correct or remove this conversation.") from error
            try:
                _require_answers(conversation)
                conversations[index] = conversation
            except RefusedConversation as error:
                found[index] = error
        asked = [index for index, conversation in conversations.items() if conversation]
        try:
            written = self._template.render_all([conversations[index] for index in asked])
        except EndlessTemplate as error:
            remedy = "Use another chat template, or remove the conversation."
            raise DataError(f"{rows.place(asked[error.index])}: {error.problem}", remedy=remedy) from error
        found |= dict(zip(asked, written, strict=True))
        each = [found.get(index, MarkedText(text="")) for index in range(len(rows))]
        texts = [text if isinstance(text, MarkedText) else MarkedText(text="") for text in each]
        return texts, {index: str(text) for index, text in enumerate(each) if isinstance(text, RefusedConversation)}


def _require_answers(conversation: Conversation) -> None:
    """Raise RefusedConversation if there is no message of the assistant, or one is empty; no messages at all is an empty document."""
    answers = [number for number, message in enumerate(conversation, start=1) if message.role == "assistant"]
    if conversation and not answers:
        raise RefusedConversation("it has no message of the assistant")
    empty = [number for number in answers if not conversation[number - 1].text.strip()]
    if empty:
        raise RefusedConversation(f"message {empty[0]} (assistant) is empty")


def _text(value: object, *, place: Callable[[int], str], index: int) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{place(index)}: the text column has type {type(value).__name__}, not text. Name another column with corpus.text_column."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        remedy = "Convert the file to UTF-8, for example with iconv, or correct this document."
        raise DataError(f"{place(index)}: the text is not valid UTF-8. {remedy}") from error
    return value
