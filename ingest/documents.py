"""What the documents of a corpus are made of: a column of text, or conversations that a chat template writes down."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..store.errors import DataError
from .chat.config import ChatConfig
from .chat.conversations import Conversation, find_reader
from .chat.marked_text import MarkedText
from .chat.template import ChatTemplate, RefusedConversation


class Documents(Protocol):
    """Reads rows of a data set as documents."""

    columns: tuple[str, ...]  # that it reads
    format: str | None  # in which `datasets` is to give them: None is Python's own types, with what JSON mixes decoded

    def read(self, batch: Any, *, where: str, first_row: int) -> tuple[list[MarkedText], Mapping[int, str]]:
        """The documents of some rows, and why some of them, by their row, are refused; those have no text.

        Args:
            batch: some rows with the columns, in the format.
            where: the file and split, for messages.
            first_row: number of the first row there.

        Raises:
            DataError: a row is not what it should be, with its number and what to do.
        """
        ...


class TextDocuments:
    """A column of text."""

    format: str | None = "arrow"

    def __init__(self, column: str, *, features: Mapping[str, Any], where: str) -> None:
        """Raise DataError where the column holds values of several kinds: `datasets` would give all of them as JSON."""
        if type(features.get(column)).__name__ == "Json":
            raise DataError(f"{where}: the column {column!r} holds values of several types, not only text. Mend these rows.")
        self.columns: tuple[str, ...] = (column,)

    def read(self, batch: Any, *, where: str, first_row: int) -> tuple[list[MarkedText], Mapping[int, str]]:
        """Null is no text; a lone surrogate, say, is an error."""
        import pyarrow as pa

        column = batch.column(self.columns[0])
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_null(column.type)):
            raise DataError(f"{where}: the text column is of type {column.type}, not text. Name another with corpus.text_column.")
        texts = []
        for row, data in enumerate(column.cast(pa.large_binary()).to_pylist(), start=first_row):
            try:
                texts.append(MarkedText(text=(data or b"").decode()))
            except UnicodeDecodeError as error:
                raise DataError(f"{where}, row {row}: the text is not valid UTF-8 ({error}). Mend or remove this document.") from error
        return texts, {}


class ChatDocuments:
    """Conversations, written down by a chat template."""

    format: str | None = None

    def __init__(self, config: ChatConfig, *, template: ChatTemplate, columns: Sequence[str], where: str) -> None:
        """Find out which of the columns hold the conversations.

        Raises:
            DataError: none does.
        """
        self._template = template
        self._reader = find_reader(columns, wanted=config.format, column=config.column, where=where)
        self.columns = self._reader.columns

    def read(self, batch: Any, *, where: str, first_row: int) -> tuple[list[MarkedText], Mapping[int, str]]:
        """Refused are conversations without an answer, with an empty one, and those that the template does not write as they are."""
        texts: list[MarkedText] = []
        refused: dict[int, str] = {}
        rows = zip(*(batch[column] for column in self.columns), strict=True)
        for row, values in enumerate(rows, start=first_row):
            fields = dict(zip(self.columns, values, strict=True))
            try:
                conversation = self._reader.read(fields)
            except ValueError as error:
                raise DataError(f"{where}, row {row}, {', '.join(self.columns)}: {error}. Mend or remove this conversation.") from error
            try:
                texts.append(self._written(conversation))
            except RefusedConversation as error:
                texts.append(MarkedText(text=""))
                refused[row] = str(error)
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
