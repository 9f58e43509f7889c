"""The `[corpus.chat]` of a recipe."""

import datetime
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from .conversations import ConversationFormat


def _is_day(text: str) -> str:
    datetime.date.fromisoformat(text)
    return text


class ChatConfig(BaseModel):
    """How conversations are read and written down."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: ConversationFormat | None = Field(
        None, description="how rows hold conversations: `messages`, `sharegpt` or `alpaca`; by default as the columns' names say"
    )
    column: str | None = Field(None, description="column with the lists of messages; by default messages, conversations or conversation")
    template: str | None = Field(
        None, description="file with the Jinja chat template that conversations are written in; by default the target's own"
    )
    date: Annotated[str, AfterValidator(_is_day)] = Field(
        "2024-07-26", description="the day (YYYY-MM-DD) that chat templates are told which ask for today's, so that runs can be repeated"
    )
