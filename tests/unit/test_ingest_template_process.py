"""Chat templates run in a process of their own: what they write is what transformers writes, and what they take is bounded."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from fuseline.ingest.chat import sandbox
from fuseline.ingest.chat.config import ChatConfig
from fuseline.ingest.chat.conversations import Message, read_messages
from fuseline.ingest.chat.marked_text import MarkedText
from fuseline.ingest.chat.sandbox import EndlessTemplate, Sandbox
from fuseline.ingest.chat.template import ChatTemplate, RefusedConversation
from fuseline.ingest.documents import ChatDocuments
from fuseline.ingest.rows import Columns, Rows
from fuseline.store.errors import DataError

TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"
CONVERSATIONS = Path(__file__).parents[2] / "recipes" / "chat-corpus" / "chat.parquet"
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
PIECES = {
    "loops": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m['content'] }}{% break %}{% endfor %}",
    "generation": "{% set x = 1 %}{% generation %}{{ x }} {{ messages[0].content }}\n{% endgeneration %}\n-",
    "json": "{{ {'b': 'é<', 'a': [1, none]} | tojson }} {{ messages | tojson(indent=2, sort_keys=true) }}",
    "names": "{% set n = namespace(self=1, x='a') %}{% set n.x = n.x ~ 'b' %}{{ n.x }}{{ dict(a=1) }}{{ dict.fromkeys([1], 2) }}",
    "underscore": "{% set n = namespace(_x=1) %}",
    "exception": "{{ raise_exception('no\nmore') }}",
    "silence": "{{ raise_exception('') }}",
    "syntax": "{% for %}",
    "undefined": "{{ nothing }}{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ nothing.at.all }}",
    "types": "{{ messages[0].content + 1 }}",
    "escape": "{{ messages.__class__.__mro__ }}",
    "change": "{{ messages.append(1) }}",
    "format": "{{ '{0.__class__}'.format(1) }}",
    "range": "{{ range(10**10) | length }}",
    "space": "  {%- if true %}\n   x\n  {% endif %}\n\n y \n",
    "surrogate": "{{ '\ud800' }}{{ '\\ud83d' }}",
}


def template(source: str, **variables: str) -> ChatTemplate:
    return ChatTemplate(
        source=source, variables=VARIABLES | variables, special=frozenset({"<s>", "</s>"}), added=frozenset(), date="2024-07-26", where="/m"
    )


@pytest.fixture
def small(monkeypatch):
    """Limits that a test reaches quickly, for a process of its own."""
    own = Sandbox()
    for module in ("sandbox", "template"):
        monkeypatch.setattr(f"fuseline.ingest.chat.{module}.SANDBOX", own)
    monkeypatch.setattr(sandbox, "TEMPLATE_SECONDS", 3)  # also for the sound ones, on a busy machine
    monkeypatch.setattr(sandbox, "TEMPLATE_BYTES", 256 << 20)
    yield own
    own.close()


def as_transformers(source: str, messages: list, *, prompt: bool) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, _ = render_jinja_template(conversations=[messages], chat_template=source, add_generation_prompt=prompt, **VARIABLES)
        return rendered[0]
    except Exception as error:
        return "refused: " + (str(error).splitlines()[0] if str(error) else type(error).__name__)


@pytest.mark.parametrize("name", [*sorted(path.name for path in TEMPLATES.iterdir()), *PIECES])
@pytest.mark.parametrize("prompt", [True, False])
def test_it_writes_what_transformers_writes(name, prompt):
    source = PIECES[name] if name in PIECES else (TEMPLATES / name).read_text(encoding="utf-8")
    conversations = [read_messages(messages) for messages in pl.read_parquet(CONVERSATIONS)["messages"].to_list()[:20]]
    conversations += [(Message("user", "é\x00\n {{ x }} \ue000"), Message("assistant", "</s>" * 3)), (Message("assistant", ""),)]
    messages = [[{"role": each.role, "content": each.text} for each in conversation] for conversation in conversations]
    answers = sandbox.SANDBOX.render(source, variables=VARIABLES, conversations=messages, prompt=prompt)
    written = [answer["text"] if "text" in answer else f"refused: {answer['refused']}" for answer in answers]
    assert written == [as_transformers(source, each, prompt=prompt) for each in messages]


def test_many_conversations_are_written_as_each_alone():
    chosen = [read_messages(messages) for messages in pl.read_parquet(CONVERSATIONS)["messages"].to_list()]
    chosen += [(Message("tool", "x"),), (), (Message("user", "x" * 300_000), Message("assistant", "y"))]
    gemma = template((TEMPLATES / "gemma-2.jinja").read_text())

    def alone(conversation: tuple):
        try:
            return gemma.render(conversation)
        except RefusedConversation as error:
            return str(error)

    written = [str(found) if isinstance(found, RefusedConversation) else found for found in gemma.render_all(chosen)]
    assert written == [alone(conversation) for conversation in chosen]
    assert {type(each) for each in written} == {str, MarkedText}


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ (messages | length + 8) ** (10 ** 9 * (messages | length)) }}",
    "text": "{{ 'a' * 10 ** 10 }}",
    "list": "{{ ([0] * 10 ** 10) | length }}",
    "doubling": "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x | length }}",
    "output": "{% for a in range(99999) %}{{ 'a' * 100000 }}{% endfor %}",
    "padding": "{{ '%10000000000d' % 1 }}",
    "sorting": "{% for a in range(99999) %}{{ (range(99999) | list | sort | string) and '' }}{% endfor %}",
}
BEFORE = PLAIN + "{% if 'bomb' in messages[0].content %}"


@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_template_ends_with_the_conversation_named(small, name):
    texts = ["sound"] * 70 + ["bomb"] + ["sound"] * 3
    rows = [[{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}] for text in texts]
    documents = ChatDocuments(
        ChatConfig(), template=template(BEFORE + ENDLESS[name] + "{% endif %}"), columns=["messages"], where="/corpus/chat.jsonl"
    )
    columns = Columns(required=documents.required)
    read = Rows.of({"messages": rows}, where="/corpus/chat.jsonl", unit="line", numbers=range(1, 75), columns=columns)
    with pytest.raises(DataError, match=r"chat\.jsonl, line 71: The chat template of /m needs more than .* Use another") as caught:
        documents.read(read)
    assert len(str(caught.value)) < 400
    texts, refused = documents.read(Rows.of({"messages": rows[:3]}, where="x", unit="line", numbers=[1, 2, 3], columns=columns))
    assert [each.text for each in texts] == ["<user>sound</s><assistant>yes</s>"] * 3
    assert refused == {}


@pytest.mark.parametrize(
    "source",
    [
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "[" * 60_000,
        "{{ " + "-" * 20_000 + "1 }}",
        "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
        "{{ 'a'" + "~'a'" * 20_000 + " }}",
        "{{ cycler.__init__.__globals__.os.system('touch /tmp/run') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ raise_exception('a' * 10 ** 7) }}",
    ],
    ids=range(10),
)
def test_a_template_that_fails_is_refused_in_a_few_words(small, source):
    try:
        found = template(source).render_all([(Message("user", "a"), Message("assistant", "b"))])
    except EndlessTemplate as error:
        found = [error]
    assert not isinstance(found[0], str)
    assert len(str(found[0])) < 1200 or "text" in repr(found[0])
    assert template(PLAIN).render((Message("user", "a"), Message("assistant", "b"))).text == "<user>a</s><assistant>b</s>"


@pytest.mark.parametrize("source", ["{{ 'a' * (length + 1) }}", "{% for i in range(2) %}{{ 'é' * length }}{% endfor %}"])
@pytest.mark.parametrize("text", ["", "a" * 100])
def test_what_a_template_writes_is_bounded(small, monkeypatch, source, text):
    monkeypatch.setattr(sandbox, "TEMPLATE_SECONDS", 60)
    monkeypatch.setattr(sandbox, "TEMPLATE_TEXT", 1 << 20)
    variables = {"length": (1 << 20) + 16 * 12 * len(text)}
    with pytest.raises(
        EndlessTemplate,
        match=r"^The chat template needs more than 64 MiB of text .* for one conversation\. Fix the chat template, or use another one\.$",
    ):
        small.render(source, variables=variables, conversations=[[{"role": "user", "content": text}]], prompt=False)
    assert small.render("x", variables={}, conversations=[[]], prompt=False) == [{"text": "x"}]


def test_what_a_template_writes_for_many_conversations_is_bounded(small, monkeypatch):
    monkeypatch.setattr(sandbox, "TEMPLATE_SECONDS", 60)
    monkeypatch.setattr(sandbox, "TEMPLATE_TEXTS", 1 << 20)
    with pytest.raises(EndlessTemplate, match="of text") as caught:
        small.render("{{ 'a' * 200000 }}", variables={}, conversations=[[]] * 100, prompt=False)
    assert caught.value.index == 5


@pytest.mark.parametrize("source", ["{{ '\\ud800' }}" + PLAIN, PLAIN + "{{ '\\udfff' }}", "{{ raise_exception('\\ud800') }}"])
def test_half_a_character_is_refused(small, source):
    (found,) = template(source).render_all([(Message("user", "a"), Message("assistant", "b"))])
    assert isinstance(found, RefusedConversation)
    assert str(found).isprintable()
    assert "half a surrogate pair" in str(found) or "says: ?" in str(found)


def test_the_process_is_used_again_and_started_again(small):
    talk = (Message("user", "a"), Message("assistant", "b"))
    template(PLAIN).render(talk)
    first = small._process.pid
    template(PLAIN).render(talk)
    assert small._process.pid == first
    os.kill(first, signal.SIGKILL)
    small._process.wait(60)
    template(PLAIN).render(talk)
    assert small._process.pid != first


def test_a_template_travels_to_another_process_with_its_name():
    assert pickle.loads(pickle.dumps(template(PLAIN))).where == "/m"


CHILD = """
import os, sys, time
from fuseline.ingest.chat import sandbox
sandbox.TEMPLATE_SECONDS = {seconds}
sandbox.SANDBOX.render("x", variables={{}}, conversations=[[]], prompt=False)
print(sandbox.SANDBOX._process.pid, flush=True)
sandbox.SANDBOX.render({source!r}, variables={{}}, conversations=[[]], prompt=False)
{then}
"""


@pytest.mark.parametrize(
    ("source", "then"), [("x", "os.kill(os.getpid(), 9)"), ("x", ""), (ENDLESS["loops"], "")], ids=["killed", "ended", "busy"]
)
def test_it_ends_with_its_parent(source, then):
    """Also in the middle of an endless loop; there, by its alarm."""
    script = CHILD.format(seconds=2, source=source, then=then)
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    if source != "x":
        time.sleep(1)  # it is in its loop now
        parent.kill()
    parent.wait(60)
    parent.stdout.close()
    deadline = time.monotonic() + 60
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_it_imports_jinja_alone():
    program = Path(sandbox.__file__).with_name("template_process.py")
    script = f"import runpy, sys; runpy.run_path({str(program)!r}, run_name='x'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=60, check=True).stdout.split()
    assert not {"torch", "transformers", "numpy", "polars", "fuseline.store"} & set(loaded)


@pytest.mark.parametrize(
    "settings",
    [
        [],
        {"bos_token": 3},
        {"bos_token": ["<s>"]},
        {"eos_token": {"contents": "x"}},
        {"chat_template": 3},
        {"chat_template": {"default": 3}},
        {"chat_template": [3]},
    ],
    ids=str,
)
def test_settings_of_other_types_are_refused(byte_level_folder, tmp_path, settings):
    from fuseline.store.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_model_folder(byte_level_folder)
    config = {"chat_template": PLAIN} | settings if isinstance(settings, dict) else settings
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"tokenizer_config\.json"):
        ChatTemplate.of_model(tmp_path, tokenizer=tokenizer, date="2024-07-26")
