"""Chat templates: how a model renders conversations.

A template is a Jinja program that comes with the tokenizer; it runs in a separate process (`sandbox`). Message text must never become a
control token, and the trained text must be known to the byte. So a conversation is rendered twice: once as it is, and once with a
placeholder for each message, which shows what the template itself writes. Only that is searched for control tokens; and the first
rendering must equal it with the messages' texts, with or without surrounding white space, filled in.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ...store.errors import DataError
from ...store.model_files import check_model_files
from ...store.model_json import read_json
from ...store.roles import ROLES
from ...store.shown import shown
from ...store.tokenizer import Tokenizer
from .conversations import Conversation, Message, Role
from .marked_text import MarkedText, MessageSpan, Span
from .sandbox import SANDBOX, EndlessTemplate, Messages

_PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")
_TODAY = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")  # formats that are literals
_LONGEST_REFUSAL = 1000  # characters of what a template says
_ASKS_FOR_TODAY = "strftime_now("
_PROBES: tuple[tuple[Role, ...], ...] = (("user", "assistant"), ("user", "assistant", "user", "assistant"), ("system", "user", "assistant"))


class RefusedConversation(ValueError):
    """A conversation that the template cannot render; the text says why."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """The output of a template for messages of given roles: literals[0] message[order[0]] literals[1] … literals[-1]."""

    literals: list[str]
    order: list[int]  # the message at each place
    leads: list[int]  # at each place, characters before it that the model writes itself: those after the prompt
    trails: list[int]  # and characters after it, up to and including the end-of-turn token


@dataclass(frozen=True)
class ChatTemplate:
    """A model's chat template, with everything that is needed to run it."""

    source: str  # the Jinja program
    variables: Mapping[str, str]  # bos_token and the like
    special: frozenset[str]  # the tokenizer's special tokens
    added: frozenset[str]  # its other added tokens, which are control tokens if the template writes them around messages
    date: str  # the day that templates get as today's date, YYYY-MM-DD
    where: str = field(default="", compare=False)  # the model's folder, for messages
    _layouts: dict[tuple[Role, ...], "_Layout | str"] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("source", "variables", "special", "added", "date", "where")} | {"_layouts": {}}

    @classmethod
    def of_model(cls, folder: Path, *, tokenizer: Tokenizer, date: str, source: str | None = None) -> "ChatTemplate | None":
        """The template of a model folder, or None if it has none; `source` is another program to use instead.

        Raises:
            DataError: it cannot be read, or fails.
        """
        check_model_files(folder)
        path = folder / "tokenizer_config.json"
        try:
            config = read_json(path) if path.exists() else {}
        except ValueError as error:
            raise DataError(f"{path} cannot be read: {error}. Download it again.") from error
        if not isinstance(config, dict):
            raise DataError(f"{path} is not an object. Download it again.")
        program = source or _stored_template(folder, config=config)
        if program is None:
            return None
        names = _named_tokens(tokenizer, program=program) | {
            name: config.get(name) for name in (f"{role}_token" for role in ROLES) if config.get(name)
        }
        variables: dict[str, str] = {}
        for name, token in names.items():
            content = token.get("content") if isinstance(token, dict) else token
            if not isinstance(content, str):
                raise DataError(f"{path}: {name} ({shown(token)}) must be a string. Correct it.")
            variables[name] = content
        added = tokenizer.backend.get_added_tokens_decoder().values()
        template = cls(
            source=program,
            variables=variables,
            special=frozenset(token.content for token in added if token.special),
            added=frozenset(token.content for token in added if not token.special and token.content.strip()),
            date=date,
            where=str(folder),
        )
        try:
            template._layout(_PROBES[0])
        except RefusedConversation as error:
            raise DataError(f"{folder}: its chat template cannot render a question and an answer: {error}") from error
        return template

    @property
    def identity(self) -> dict[str, Any]:
        """What determines a rendering, besides the tokenizer."""
        return {"template": self.source, "variables": dict(self.variables), "date": self.date if _ASKS_FOR_TODAY in self.source else None}

    @cached_property
    def controls(self) -> frozenset[str]:
        """The tokens that are control tokens if the template writes them, and text everywhere else.

        These are all special tokens, and other added tokens that the template writes around messages (DeepSeek's `<｜User｜>`).
        """
        return self.special | frozenset(token for token in self.added if any(token in literal for literal in self._probed_literals))

    @cached_property
    def end_of_turn(self) -> str | None:
        """The control token that ends the assistant's turn; None if the template writes none."""
        found = self._control_pattern.match(self._split(_PROBES[0])[0][-1].lstrip())
        return found[0] if found else None

    @cached_property
    def bos_begins_turns(self) -> bool:
        """Whether the tokenizer's bos only marks the beginning of turns, like `<|im_start|>` of SmolLM2."""
        bos = self.variables.get("bos_token")
        return bos is not None and sum(literal.count(bos) for literal in self._split(_PROBES[0])[0]) > 1

    @cached_property
    def written_controls(self) -> list[str]:
        """The control tokens that the template writes around messages of the usual roles, sorted."""
        return sorted({found[0] for literal in self._probed_literals for found in self._control_pattern.finditer(literal)})

    def render(self, conversation: Conversation) -> MarkedText:
        """Render a conversation.

        Raises:
            RefusedConversation: the template refuses it, leaves out or repeats a message, or changes a message's text.
        """
        (rendered,) = self.render_all([conversation])
        if isinstance(rendered, RefusedConversation):
            raise rendered
        return rendered

    def render_all(self, conversations: Sequence[Conversation]) -> list[MarkedText | RefusedConversation]:
        """Render many conversations, which is faster than one by one. If `render` would raise, the result holds the error instead.

        Raises:
            EndlessTemplate: the template exceeds a limit.
        """
        found: dict[int, MarkedText | RefusedConversation] = {}
        taken: list[tuple[int, _Layout]] = []
        for index, conversation in enumerate(conversations):
            try:
                taken.append((index, self._layout(tuple(message.role for message in conversation))))
            except RefusedConversation as error:
                found[index] = error
        try:
            written = self._apply_all([_as_messages(conversations[index]) for index, _ in taken])
        except EndlessTemplate as error:
            error.index = taken[error.index][0]
            raise
        for (index, layout), text in zip(taken, written, strict=True):
            try:
                found[index] = text if isinstance(text, RefusedConversation) else self._marked(conversations[index], text, layout=layout)
            except RefusedConversation as error:
                found[index] = error
        return [found[index] for index in range(len(conversations))]

    def _marked(self, conversation: Conversation, text: str, *, layout: _Layout) -> MarkedText:
        """The marked text of a rendered conversation."""
        controls: list[Span] = []
        assistant: list[Span] = []
        messages: list[MessageSpan] = []
        place = 0
        for number, literal in enumerate(layout.literals):
            if not text.startswith(literal, place):
                raise RefusedConversation(_changed(conversation, layout.order, number - 1))
            controls += [(place + found.start(), place + found.end()) for found in self._control_pattern.finditer(literal)]
            place += len(literal)
            if number == len(layout.order):
                break
            message = conversation[layout.order[number]]
            following = layout.literals[number + 1]
            written = _as_written(message.text, text=text, place=place, following=following, is_last=number + 1 == len(layout.order))
            if written is None:
                raise RefusedConversation(_changed(conversation, layout.order, number))
            messages.append(MessageSpan(message.role, place, place + len(written)))
            if message.role == "assistant":
                assistant.append((place - layout.leads[number], place + len(written) + layout.trails[number]))
            place += len(written)
        if place != len(text):
            raise RefusedConversation(_changed(conversation, layout.order, len(layout.order) - 1))
        return MarkedText(text=text, control_spans=tuple(controls), assistant_spans=tuple(assistant), messages=tuple(messages))

    def prompt(self, conversation: Conversation) -> MarkedText:
        """Render a conversation up to the point where the assistant answers.

        Raises:
            RefusedConversation: as in `render`.
        """
        rendered = self.render((*conversation, Message("assistant", "answer")))
        return rendered.cut([rendered.assistant_spans[-1][0]])[0]

    # ---- running the program -----------------------------------------------------------------------------------------------------------

    def _apply(self, messages: Messages, *, prompt: bool = False) -> str:
        (text,) = self._apply_all([messages], prompt=prompt)
        if isinstance(text, RefusedConversation):
            raise text
        return text

    def _apply_all(self, conversations: Sequence[Messages], *, prompt: bool = False) -> list[str | RefusedConversation]:
        try:
            answers = SANDBOX.render(self._program, variables=self.variables, conversations=conversations, prompt=prompt)
        except EndlessTemplate as error:
            raise EndlessTemplate(error.index, limit=error.limit, of=f" of {self.where}") from error
        return [_text_of(answer) for answer in answers]

    @cached_property
    def _program(self) -> str:
        """The program with a fixed date instead of today's, because otherwise the corpus would change every day."""
        if _ASKS_FOR_TODAY not in self.source:
            return self.source
        day = datetime.date.fromisoformat(self.date)
        cases = [(json.dumps(each), day.strftime(each)) for each in sorted({found[2] for found in _TODAY.finditer(self.source)})]
        known = "".join(f"{{%- if format == {each} -%}}{text}{{%- else -%}}" for each, text in cases)
        unknown = (
            "{{ raise_exception('asks for the date in a format that it does not write out: write it out in a copy of the template') }}"
        )
        return f"{{%- macro strftime_now(format) -%}}{known}{unknown}{'{%- endif -%}' * len(cases)}{{%- endmacro -%}}{self.source}"

    # ---- what the program writes by itself ---------------------------------------------------------------------------------------------

    def _layout(self, roles: tuple[Role, ...]) -> _Layout:
        if roles not in self._layouts:
            try:
                self._layouts[roles] = self._make_layout(roles)
            except RefusedConversation as error:
                self._layouts[roles] = str(error)
        found = self._layouts[roles]
        if isinstance(found, str):
            raise RefusedConversation(found)
        return found

    def _make_layout(self, roles: tuple[Role, ...]) -> _Layout:
        literals, order = self._split(roles)
        for index, role in enumerate(roles):
            if order.count(index) != 1 and (role == "assistant" or index not in order):
                raise RefusedConversation(f"the chat template writes message {index + 1} ({role}) {order.count(index)} times")
        lead = self._lead
        leads, trails = [], []
        for place, index in enumerate(order):
            is_assistant = roles[index] == "assistant"
            leads.append(len(lead) if is_assistant and literals[place].endswith(lead) else 0)
            trails.append(_trail(literals[place + 1], end_of_turn=self.end_of_turn) if is_assistant else 0)
        return _Layout(literals, order, leads, trails)

    def _split(self, roles: tuple[Role, ...], *, prompt: bool = False) -> tuple[list[str], list[int]]:
        messages = [{"role": role, "content": f"\ue000{index}\ue001"} for index, role in enumerate(roles)]
        pieces = _PLACEHOLDER.split(self._apply(messages, prompt=prompt))
        return pieces[::2], [int(index) for index in pieces[1::2]]

    @cached_property
    def _lead(self) -> str:
        """White space before an answer that is not in its prompt, so the model must write it (` ` after Llama-2's `[/INST]`)."""
        literals, order = self._split(_PROBES[0])
        try:
            asked, asked_order = self._split(_PROBES[0][:1], prompt=True)
        except RefusedConversation:
            return ""
        is_prefix = (asked_order, asked[:-1]) == (order[:1], literals[:1]) and literals[1].startswith(asked[1])
        lead = literals[1].removeprefix(asked[1])
        return lead if is_prefix and not lead.strip() else ""

    @cached_property
    def _probed_literals(self) -> list[str]:
        found: list[str] = []
        for roles in _PROBES:
            try:
                found += self._split(roles)[0]
            except RefusedConversation:  # for example, no system message allowed
                continue
        return found

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(token) for token in sorted(self.controls, key=len, reverse=True)) or r"(?!)")


def _as_messages(conversation: Conversation) -> Messages:
    return [{"role": message.role, "content": message.text} for message in conversation]


def _named_tokens(tokenizer: Tokenizer, *, program: str) -> dict[str, Any]:
    """The tokens of the roles that a program uses; others are not part of its identity."""
    found = {f"{role}_token": token_id for role, token_id in tokenizer.roles.items()}
    return {name: tokenizer.backend.id_to_token(token_id) for name, token_id in found.items() if token_id is not None and name in program}


def _stored_template(folder: Path, *, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read: {error}.") from error
    stored = config.get("chat_template")
    if isinstance(stored, list) and all(isinstance(each, dict) for each in stored):  # several templates, by name
        stored = {each.get("name"): each.get("template") for each in stored}
    if isinstance(stored, dict):
        stored = stored.get("default")
    if stored is not None and not isinstance(stored, str):
        raise DataError(f"{folder}/tokenizer_config.json: chat_template is of type {type(stored).__name__}, not a Jinja template.")
    return stored or None


def _text_of(answer: Mapping[str, str]) -> str | RefusedConversation:
    """The template's output, if it is text."""
    if "text" not in answer:
        said = answer["refused"][:_LONGEST_REFUSAL].encode(errors="replace").decode()
        return RefusedConversation(f"the chat template says: {said}")
    try:
        answer["text"].encode()
    except UnicodeEncodeError as error:
        return RefusedConversation(f"the chat template writes half a surrogate pair (U+{ord(answer['text'][error.start]):04X})")
    return answer["text"]


def _trail(literal: str, *, end_of_turn: str | None) -> int:
    """How many characters after an answer the model must write: up to and including its end-of-turn token."""
    blank = len(literal) - len(literal.lstrip())
    return blank + len(end_of_turn) if end_of_turn and literal.startswith(end_of_turn, blank) else 0


def _as_written(message: str, *, text: str, place: int, following: str, is_last: bool) -> str | None:
    """The message as the template wrote it at a place: whole, or without surrounding white space."""
    for written in (message, message.strip(), message.rstrip(), message.lstrip()):
        end = place + len(written)
        if text.startswith(written + following, place) and (not is_last or end + len(following) == len(text)):
            return written
    return None


def _changed(conversation: Conversation, order: Sequence[int], number: int) -> str:
    if not 0 <= number < len(order):
        return "the chat template writes different text before the first message, depending on the message"
    return f"the chat template changes the text of message {order[number] + 1} ({conversation[order[number]].role})"
