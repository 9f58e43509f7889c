"""Chooses the chat template of a corpus's conversations, and how each model of a recipe reads them."""

from dataclasses import dataclass
from pathlib import Path

from ...store.errors import DataError, UsageError
from ...store.paths import expanded
from ...store.tokenizer import Tokenizer
from ...store.user_text import read_user_text
from ..models import ModelFolder
from .config import ChatConfig
from .reader import ConversationsReader, Rendering
from .template import ChatTemplate


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusTemplate:
    """The chat template of the conversations, and the digest of the tokenizer whose control tokens it writes."""

    template: ChatTemplate
    tokenizer: str

    @classmethod
    def of(cls, config: ChatConfig, *, target: ModelFolder, base: Path) -> "CorpusTemplate":
        """The target's own template, or the one that the recipe names.

        Args:
            config: the recipe's.
            target: the model that is trained.
            base: the recipe's folder, to which paths in it are relative.

        Raises:
            UsageError: there is none, or it cannot be read.
            DataError: it fails.
        """
        source = None
        if config.template is not None:
            source = read_user_text(base / expanded(config.template), what=f"corpus.chat.template ({config.template})")
        template = ChatTemplate.of_model(target.folder, tokenizer=target.tokenizer, date=config.date, source=source)
        if template is None:
            raise UsageError(
                f"{target.folder} has no chat template for conversations (chat_template.jinja, or chat_template in "
                "tokenizer_config.json). Name a Jinja file with corpus.chat.template."
            )
        if template.end_of_turn is None:
            eos = template.variables.get("eos_token", "eos")
            raise UsageError(
                f"{config.template or target.folder}: the chat template writes no control token of the target after an answer, so the "
                f"model would never learn to stop. Name a template that ends answers, for example with {eos}, with corpus.chat.template."
            )
        return cls(template=template, tokenizer=target.tokenizer.digest)

    def readers(self, tokenizer: Tokenizer) -> list[ConversationsReader]:
        """A reader that counts tokens for models with this tokenizer. It ignores how sources end turns."""
        renderings: list[Rendering] = ["foreign", "shared"] if tokenizer.digest == self.tokenizer else ["foreign"]
        return [ConversationsReader(tokenizer, template=self.template, rendering=rendering) for rendering in renderings]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatReading:
    """How a model reads the conversations of a corpus: the arguments of `ConversationsReader` except the tokenizer."""

    template: ChatTemplate
    rendering: Rendering
    own: ChatTemplate | None = None

    @classmethod
    def of_source(cls, model: ModelFolder, *, written: CorpusTemplate, date: str) -> "ChatReading":
        """How a source reads them: the corpus's text, or its own rendering if the recipe says so.

        Raises:
            UsageError: the recipe says so, but it has no template of its own.
        """
        try:
            own = ChatTemplate.of_model(model.folder, tokenizer=model.tokenizer, date=date)
        except DataError:
            if model.config.chat_template == "own":
                raise
            own = None  # it is only needed for how the model ends turns
        if model.config.chat_template == "shared":
            return cls(template=written.template, rendering="foreign", own=own)
        if own is None:
            raise UsageError(f"{model.config.name}: chat_template is 'own', but {model.folder} has no chat template. Remove the key.")
        return cls(template=own, rendering="own")

    def reader(self, tokenizer: Tokenizer) -> ConversationsReader:
        """The reader."""
        return ConversationsReader(tokenizer, template=self.template, rendering=self.rendering, own=self.own)
