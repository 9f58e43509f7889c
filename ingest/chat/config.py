"""The `[corpus.chat]` of a recipe."""

import datetime
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from .conversations import ConversationFormat


def _is_day(text: str) -> str:
    try:
        datetime.date.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"must be a day such as 2024-07-26, but is {text!r}") from error
    return text


class ChatConfig(BaseModel):
    """How conversations are read and rendered."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: ConversationFormat | None = Field(
        None,
        description="how rows hold conversations: lists of `messages` (also ShareGPT's), or `alpaca`; by default by the columns' names",
    )
    column: str | None = Field(None, description="column with the lists of messages; by default messages, conversations or conversation")
    template: str | None = Field(
        None, description="file with the Jinja chat template that renders conversations; by default the target's own"
    )
    date: Annotated[str, AfterValidator(_is_day)] = Field(
        "2024-07-26", description="day (YYYY-MM-DD) that chat templates get when they ask for today's date, so that runs can be repeated"
    )
