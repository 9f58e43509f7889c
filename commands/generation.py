"""Chat with a model: `fuseline chat`.

A prompt is read like the conversations in training: control tokens come from the chat template, and user input stays text.
"""

import codecs
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ingest.chat.config import ChatConfig
from ..ingest.chat.conversations import Conversation, Message
from ..ingest.chat.reader import ConversationsReader
from ..ingest.chat.template import ChatTemplate, RefusedConversation
from ..ingest.model_config import ModelConfig
from ..ingest.models import ModelFolder
from ..store.errors import UsageError
from ..store.machine import arithmetic_for
from ..store.tokenizer import Tokenizer
from .terminal import say

if TYPE_CHECKING:
    import torch


class ChatModel:
    """A chat model that answers, token by token."""

    def __init__(self, folder: Path) -> None:
        """Load a model folder in the Hugging Face format, in the number format of its config.json.

        Raises:
            DataError: the model cannot be used.
            UsageError: the model has no chat template.
        """
        from transformers import GenerationConfig

        from ..ingest.forward import CausalModel

        if not folder.is_dir():
            raise UsageError(f"Give the folder of a model, such as workspaces/NAME/exports/NAME. There is no folder {folder}.")
        files = ModelFolder(ModelConfig(name="chat", model=str(folder)), folder).check()
        template = ChatTemplate.of_model(folder, tokenizer=files.tokenizer, date=ChatConfig().date)
        if template is None:
            raise UsageError(f"Choose a chat model: {folder} has no chat template.")
        self.context_length = files.context_length
        self._tokenizer, self._template = files.tokenizer, template
        self._reader = ConversationsReader(files.tokenizer, template=template, rendering="shared")
        dtype = files.stored_dtype
        self._loaded = CausalModel(folder, dtype=dtype, arithmetic=arithmetic_for(dtype), trust_remote_code=False)
        self._stops = self._stops_of(self._loaded.model.generation_config.eos_token_id)
        # Ignore penalties, beams and the like in the model's generation_config.json: transformers would apply them.
        self._loaded.model.generation_config = GenerationConfig()

    def answer(
        self, conversation: Conversation, *, show: Callable[[str], None], max_tokens: int, temperature: float, seed: int | None = None
    ) -> str:
        """Answer the last message, calling `show` with each piece of text as it comes.

        Args:
            conversation: the last message is the user's.
            show: gets complete characters only.
            max_tokens: maximum number of tokens in the answer.
            temperature: divides the logits; 0 takes the most probable token each time.
            seed: for sampling tokens; by default a different one each time.

        Raises:
            UsageError: the chat template refuses the conversation, or the conversation is longer than the model's context.
        """
        import torch
        from transformers import GenerationConfig

        try:
            prompt = self._reader.encode([self._template.prompt(conversation)]).segments.token_ids_T.tolist()
        except RefusedConversation as error:
            raise UsageError(f"The model cannot answer this: {error}.") from error
        if self.context_length is not None and len(prompt) + max_tokens > self.context_length:
            raise UsageError(
                f"The conversation ({len(prompt)} tokens) and --max-tokens ({max_tokens}) must together be at most the model's context "
                f"({self.context_length}). Lower --max-tokens, or start a new conversation with /reset."
            )
        if seed is not None:
            torch.manual_seed(seed)
        text = _Text(self._tokenizer, show=show, n_skipped=len(prompt))
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        settings = GenerationConfig(max_new_tokens=max_tokens, eos_token_id=self._stops, pad_token_id=self._stops[0], **sampling)
        ids_BL = torch.tensor([prompt], device=self._loaded.device)
        self._loaded.model.generate(ids_BL, attention_mask=torch.ones_like(ids_BL), generation_config=settings, streamer=text)
        return text.so_far

    def _stops_of(self, eos: Any) -> list[int]:
        """The tokens that end an answer; `eos` is the value in generation_config.json."""
        found = [self._reader.end_of_turn_id, self._tokenizer.roles["eos"], *(eos if isinstance(eos, list) else [eos])]
        return list(dict.fromkeys(token_id for token_id in found if type(token_id) is int))


class _Text:
    """Decodes tokens to text as they arrive; transformers calls it a streamer."""

    def __init__(self, tokenizer: Tokenizer, *, show: Callable[[str], None], n_skipped: int) -> None:
        self._bytes, self._show, self._n_skipped = tokenizer.token_bytes, show, n_skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.so_far = ""

    def put(self, value: "torch.Tensor") -> None:
        """Take the next tokens. The first call passes the prompt."""
        for token_id in value.flatten().tolist():
            if self._n_skipped:
                self._n_skipped -= 1
            elif token_id < len(self._bytes):
                self._say(self._decoder.decode(self._bytes[token_id]))

    def end(self) -> None:
        """Take the end of the tokens."""
        self._say(self._decoder.decode(b"", final=True))

    def _say(self, text: str) -> None:
        if text:
            self.so_far += text
            self._show(text)


def talk(model: ChatModel, *, system: str | None, show: Callable[[str], None], **how: Any) -> None:
    """Answer questions until the user leaves: at a prompt, or one question for each line of the standard input.

    Args:
        model: the model that answers.
        system: a message placed before all others.
        show: gets the text of answers as it is generated.
        how: the other arguments of `ChatModel.answer`.
    """
    first = (Message("system", system),) if system else ()
    conversation: Conversation = first
    for question in _questions():
        if question.strip() == "/reset":
            conversation = first
        elif question.strip():
            asked = (*conversation, Message("user", question))
            try:
                answer = model.answer(asked, show=show, **how)
            except UsageError as error:
                say(f"Error: {error}", err=True)
                continue
            except KeyboardInterrupt:
                show("\n")
                continue
            show("\n")
            conversation = (*asked, Message("assistant", answer)) if answer.strip() else conversation


def _questions() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession("you> ")
    while True:
        try:
            yield session.prompt()
        except KeyboardInterrupt:
            continue  # drops the line, like a shell
        except EOFError:
            return
