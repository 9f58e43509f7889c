"""Rows of data sets as conversations, and the chat templates that write them down."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from fuseline.ingest.chat.conversations import Message, find_reader, read_alpaca, read_messages
from fuseline.ingest.chat.marked_text import MarkedText, MessageSpan
from fuseline.ingest.chat.placing import placed
from fuseline.ingest.chat.reader import ConversationsReader
from fuseline.ingest.chat.template import ChatTemplate, RefusedConversation
from fuseline.store.errors import DataError
from fuseline.store.tokenizer import Tokenizer
from support.chat import PUBLISHED, save_tokenizer

ASKED = (Message("user", "Why?"), Message("assistant", "Because."))


@pytest.mark.parametrize(
    "value",
    [
        [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}],
        [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}],
        [{"from": "Human", "value": "Why?"}, {"from": "GPT", "value": "Because."}],
        {"from": ["human", "gpt"], "value": ["Why?", "Because."]},
        [{"role": None, "content": None, "from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because.", "weight": 1}],
        [{"role": "user", "content": [{"type": "text", "text": "Wh"}, {"text": "y?"}]}, {"role": "model", "content": "Because."}],
    ],
)
def test_lists_of_messages_of_every_kind(value):
    assert read_messages(value) == ASKED


def test_alpaca_rows():
    assert read_alpaca({"instruction": "Why?", "input": "", "output": "Because."}) == ASKED
    assert read_alpaca({"instruction": "Add.", "input": "1 and 2", "output": "3"})[0] == Message("user", "Add.\n\n1 and 2")
    assert read_alpaca({"instruction": "Why?", "output": "Because.", "system": "Be brief."}) == (Message("system", "Be brief."), *ASKED)
    assert read_alpaca({"instruction": None, "output": "Because."}) == ()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("text", "is of type str, not a list of messages"),
        (["text"], "message 1 is of type str, not an object with a role and a text"),
        ([{"role": "user", "content": "a"}, {"role": "<|im_end|>", "content": "b"}], "message 2: the role ('<|im_end|>') must be one of"),
        ([{"role": "user", "content": 3}], "message 1: the text is of type int"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "message 1 has a part that is not text"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "message 1 has tool_calls"),
        ([{"role": "assistant", "content": "x", "weight": 0}], "message 1 has weight 0"),
        ([{"role": "assistant", "content": "x", "reasoning_content": "hm"}], "message 1 has reasoning_content"),
        ({"from": ["human"], "value": ["a", "b"]}, "the lists from, value have different lengths"),
        ([{"role": "user", "content": "\ud800"}], "message 1: the text is not valid Unicode"),
    ],
)
def test_what_is_wrong_with_a_row_is_reported(value, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        read_messages(value)


def test_columns_say_the_format_and_a_missing_one_is_reported():
    assert find_reader(["id", "conversations"], wanted=None, column=None, where="d").required == ("conversations",)
    assert find_reader(["instruction", "output", "messages"], wanted="alpaca", column=None, where="d").required == ("instruction", "output")
    assert find_reader(["turns"], wanted=None, column="turns", where="d").required == ("turns",)
    with pytest.raises(DataError, match=r"its columns are text, not messages.*corpus\.chat\.column"):
        find_reader(["text"], wanted=None, column=None, where="d")
    with pytest.raises(DataError, match="messages, not turns"):
        find_reader(["messages"], wanted=None, column="turns", where="d")


@pytest.fixture(scope="module")
def chatml(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    return save_tokenizer(folder / "model", published=PUBLISHED[0], family="byte-level", trained=folder)


def template(folder: Path, source: str | None = None, *, date: str = "2024-07-26") -> ChatTemplate:
    found = ChatTemplate.of_model(folder, tokenizer=Tokenizer.from_model_folder(folder), date=date, source=source)
    assert found is not None
    return found


EVERY = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (EVERY.replace("m.content", "m.content | upper"), "changes the text of message 1 (user)"),
        (EVERY.replace("m.content", "m.content + m.content"), "writes message 2 (assistant) 2 times"),
        (EVERY.replace("messages", "messages[:1]"), "writes message 2 (assistant) 0 times"),
        ("{{ raise_exception('not like this') }}", "says: not like this"),
        ("{% for m in messages %}", "Unexpected end of template"),
    ],
)
def test_a_template_that_does_not_write_every_message_once_and_as_it_is_is_reported(chatml, source, said):
    with pytest.raises((RefusedConversation, DataError)) as error:
        template(chatml, source).render((Message("user", "a"), Message("assistant", "b")))
    assert said in str(error.value)


def test_a_message_that_the_template_changes_is_refused_and_others_are_not(chatml):
    found = template(chatml, EVERY.replace("m.content", "m.content.split('</think>')[-1]"))
    assert found.render(ASKED).text == "<|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\nBecause.<|im_end|>"
    with pytest.raises(RefusedConversation, match=r"changes the text of message 2 \(assistant\)"):
        found.render((ASKED[0], Message("assistant", "hm</think>Because.")))


def test_today_is_the_day_that_the_recipe_says(chatml):
    source = "{{ strftime_now('%d %b %Y') }} {{ strftime_now(\"%Y-%m-%d\") }}" + EVERY
    assert template(chatml, source, date="2031-02-03").render(ASKED).text.startswith("03 Feb 2031 2031-02-03<|im_start|>")


def test_a_model_without_a_template_has_none_and_one_of_several_is_the_default(chatml, tmp_path):
    (chatml / "chat_template.jinja").rename(tmp_path / "kept")
    tokenizer = Tokenizer.from_model_folder(chatml)
    try:
        assert ChatTemplate.of_model(chatml, tokenizer=tokenizer, date="2024-07-26") is None
        config = json.loads((chatml / "tokenizer_config.json").read_text())
        several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": EVERY}]
        (chatml / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": several}))
        assert template(chatml).source == EVERY
    finally:
        (tmp_path / "kept").rename(chatml / "chat_template.jinja")


def test_tokens_that_the_files_do_not_name_are_passed_to_templates_that_ask_for_them(chatml, tmp_path):
    folder = Path(shutil.copytree(chatml, tmp_path / "model"))
    config = {key: value for key, value in json.loads((folder / "tokenizer_config.json").read_text()).items() if not key.endswith("_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "Qwen2Tokenizer", "bos_token": "<|im_start|>"}))
    assert template(folder, EVERY).identity["variables"] == {"bos_token": "<|im_start|>"}  # as before such tokens were known
    asks = template(folder, EVERY + "{{ eos_token }}")
    assert asks.identity["variables"] == {"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>"}
    assert asks.render(ASKED).text.endswith("<|im_end|><|endoftext|>")


def test_a_control_token_without_an_embedding_is_reported(chatml):
    tokenizer = Tokenizer.from_model_folder(chatml)
    reader = ConversationsReader(tokenizer, template=template(chatml), rendering="shared")
    reader.require_known(tokenizer.vocab_size)
    with pytest.raises(DataError, match=r"control token <\|im_end\|> \(\d+\) must be below vocab_size"):
        reader.require_known(tokenizer.backend.token_to_id("<|im_end|>"))


def test_a_prompt_ends_where_the_answer_begins(chatml):
    prompt = template(chatml).prompt(ASKED[:1])
    assert prompt.text.endswith("<|im_start|>assistant\n")
    tokenizer = Tokenizer.from_model_folder(chatml)
    reader = ConversationsReader(tokenizer, template=template(chatml), rendering="shared")
    asked, whole = (reader.encode([text]).segments.token_ids_T.tolist() for text in (prompt, template(chatml).render(ASKED)))
    assert whole[: len(asked)] == asked


def test_a_rendering_that_trims_a_message_is_placed_where_the_message_begins():
    shared = MarkedText(
        text="Q<a>  hi there<e>", assistant_spans=((4, 17),), messages=(MessageSpan("user", 0, 1), MessageSpan("assistant", 4, 14))
    )
    own = MarkedText(
        text="[Q] hi there|.", assistant_spans=((3, 13),), messages=(MessageSpan("user", 1, 2), MessageSpan("assistant", 4, 12))
    )
    ends_T = np.array([1, 3, 6, 12, 13, 14])  # "[", "Q]", " hi", " there", "|", "."
    assert placed(ends_T, own=own, shared=shared).tolist() == [4, 4, 8, 14, 17, 17]
