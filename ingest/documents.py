"""What the documents of a corpus are made of: a column of text, or conversations that a chat template writes down."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from ..store.errors import DataError
from .chat.config import ChatConfig
from .chat.conversations import Conversation, find_reader
from .chat.marked_text import MarkedText
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
        """Columns that are read where it has them."""
        ...

    def read(self, rows: Rows) -> tuple[list[MarkedText], Mapping[int, str]]:
        """The documents of some rows, and why some of them, by their index, are refused; those have no text.

        Raises:
            DataError: a row is not what it should be, with its place and what to do.
        """
        ...


class TextDocuments:
    """A column of text."""

    optional: Sequence[str] = ()

    def __init__(self, column: str) -> None:
        self.required: Sequence[str] = (column,)

    def read(self, rows: Rows) -> tuple[list[MarkedText], Mapping[int, str]]:
        """Null is no text; a lone surrogate, say, is an error."""
        (column,) = self.required
        return [MarkedText(text=_text(value, place=rows.place, index=index)) for index, value in enumerate(rows.columns[column])], {}


class ChatDocuments:
    """Conversations, written down by a chat template."""

    def __init__(self, config: ChatConfig, *, template: ChatTemplate, columns: Sequence[str], where: str) -> None:
        """Find out which of the columns hold the conversations.

        Raises:
            DataError: none does.
        """
        self._template = template
        self._reader = find_reader(columns, wanted=config.format, column=config.column, where=where)
        self.required, self.optional = self._reader.required, self._reader.optional

    def read(self, rows: Rows) -> tuple[list[MarkedText], Mapping[int, str]]:
        """Refused are conversations without an answer, with an empty one, and those that the template does not write as they are."""
        texts: list[MarkedText] = []
        refused: dict[int, str] = {}
        columns = (*self.required, *self.optional)
        for index, values in enumerate(zip(*(rows.columns[column] for column in columns), strict=True)):
            fields = dict(zip(columns, values, strict=True))
            try:
                conversation = self._reader.read(fields)
            except ValueError as error:
                raise DataError(f"{rows.place(index)}, {', '.join(columns)}: {error}. Correct or remove this conversation.") from error
            try:
                texts.append(self._written(conversation))
            except RefusedConversation as error:
                texts.append(MarkedText(text=""))
                refused[index] = str(error)
        return texts, refused

    def _written(self, conversation: Conversation) -> MarkedText:
        if not conversation:
            return MarkedText(text="")
        answers = [number for number, message in enumerate(conversation, start=1) if message.role == "assistant"]
        if not answers:
            raise RefusedConversation("it has no message of the assistant")
        empty = [number for number in answers if not conversation[number - 1].text.strip()]
        if empty:
            raise RefusedConversation(f"message {empty[0]} (assistant) is empty")
        return self._template.render(conversation)


def _text(value: object, *, place: Callable[[int], str], index: int) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{place(index)}: the text column is of type {type(value).__name__}, not text. Name another with corpus.text_column."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        remedy = "Convert the file to UTF-8, for example with iconv, or correct this document."
        raise DataError(f"{place(index)}: the text is not valid UTF-8. {remedy}") from error
    return value
