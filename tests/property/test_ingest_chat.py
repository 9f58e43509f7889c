"""Conversations in published chat templates under tokenizers of several families: control tokens and masks, to the byte."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from fuseline.ingest.chat.conversations import Message
from fuseline.ingest.chat.marked_text import MarkedText, columns_of, segments_of
from fuseline.ingest.chat.reader import ConversationsReader
from fuseline.ingest.chat.segment import segment_conversations
from fuseline.ingest.chat.template import ChatTemplate
from fuseline.store.tokenizer import Tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.chat import FAMILIES, PUBLISHED, Published, save_tokenizer
from transformers import PreTrainedTokenizerFast

CONTROLS = sorted({token for published in PUBLISHED for token in (*published.special, *published.added)})
pieces = st.one_of(
    st.sampled_from(["answer", "It's", "12", "日本", "ё", " ", "  ", "\n", "\n\n", "\t", ".", "user", "<", "|>", "assistant\n"]),
    st.sampled_from(CONTROLS),
    st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Co", "Cn"), exclude_characters="▁"), max_size=5),
)
texts = st.lists(pieces, min_size=1, max_size=6).map("".join).filter(str.strip)
templates = pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.name)
several = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@st.composite
def conversations(draw: st.DrawFn, *, takes_system: bool) -> tuple[Message, ...]:
    turns = draw(st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
    system = [Message("system", draw(texts))] if takes_system and draw(st.booleans()) else []
    return (*system, *(Message(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


class Model:
    """A tokenizer of a family with a template's control tokens."""

    def __init__(self, folder: Path, published: Published) -> None:
        self.tokenizer = Tokenizer.from_model_folder(folder)
        found = ChatTemplate.of_model(folder, tokenizer=self.tokenizer, date="2024-07-26")
        assert found is not None
        self.template, self.published = found, published
        self.hugging_face = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), chat_template=published.source, bos_token=published.bos, eos_token=published.eos
        )


@pytest.fixture(scope="module")
def models(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Model]:
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for number, published in enumerate(PUBLISHED):
        for family in [list(FAMILIES)[(number + step) % len(FAMILIES)] for step in range(2)]:  # each family under several templates
            place = save_tokenizer(folder / f"{published.name}-{family}", published=published, family=family, trained=trained)
            found[published.name, family] = Model(place, published)
    return found


def of_template(models: dict[tuple[str, str], Model], published: Published) -> list[Model]:
    return [model for (name, _), model in models.items() if name == published.name]


def is_rewritten(conversation: tuple[Message, ...], *, family: str) -> bool:
    """Whether a tokenizer of the family may read equivalent texts: composed characters, or spaces for the mark that stands for them."""
    has_mark = any("▁" in message.text for message in conversation)
    return family == "composing" or (has_mark and family != "byte-level")


def labelled(model: ConversationsReader, segment: MarkedText) -> tuple[list[int], bytes]:
    """The tokens that are trained on, and the bytes of the text that they stand for."""
    read = model.encode([segment])
    assert read.segments.is_lossless_S.all(), read.reasons
    ids, ends, data = read.segments.token_ids_T.tolist(), [0, *read.segments.byte_ends_T.tolist()], segment.text.encode()
    chosen = [place + 1 for place in np.flatnonzero(read.label_mask_T).tolist()]
    return [ids[place] for place in chosen], b"".join(data[ends[place] : ends[place + 1]] for place in chosen)


@templates
@several
@given(data=st.data())
def test_exactly_what_the_assistant_writes_is_trained_on(models, published: Published, data: st.DataObject) -> None:
    conversation = data.draw(conversations(takes_system=published.takes_system))
    answers = [message.text for message in conversation if message.role == "assistant"]
    for model in of_template(models, published):
        rendered = model.template.render(conversation)
        ids, trained_on = labelled(ConversationsReader(model.tokenizer, template=model.template, rendering="shared"), rendered)
        assert trained_on == "".join(published.written(text) + published.end_of_turn for text in answers).encode()
        assert ids.count(model.tokenizer.backend.token_to_id(published.end_of_turn)) == len(answers)
        for text, (start, end) in zip(answers, rendered.assistant_spans, strict=True):
            assert rendered.text[start:end] == published.written(text) + published.end_of_turn


@templates
@several
@given(data=st.data())
def test_the_text_is_that_of_transformers_and_control_tokens_are_the_templates_alone(models, published, data: st.DataObject) -> None:
    conversation = data.draw(conversations(takes_system=published.takes_system))
    messages = [{"role": message.role, "content": message.text} for message in conversation]
    plain = [{"role": message.role, "content": "x"} for message in conversation]
    for model in of_template(models, published):
        rendered = model.template.render(conversation)
        if "strftime_now" not in published.source:
            assert rendered.text == model.hugging_face.apply_chat_template(messages, tokenize=False)
        read = ConversationsReader(model.tokenizer, template=model.template, rendering="shared").encode([rendered])
        controls = {model.tokenizer.backend.token_to_id(token) for token in (*published.special, *published.added)}
        written = [token_id for token_id in read.segments.token_ids_T.tolist() if token_id in controls]
        expected = [
            token_id
            for token_id in model.hugging_face(model.hugging_face.apply_chat_template(plain, tokenize=False), add_special_tokens=False)[
                "input_ids"
            ]
            if token_id in controls
        ]
        assert written == expected


@templates
@several
@given(data=st.data())
def test_tokens_are_their_text_and_a_space_is_put_only_where_the_tokenizer_puts_one(models, published, data: st.DataObject) -> None:
    """A space of the tokenizer's own in the middle of a turn would be one that the model learns to write."""
    conversation = data.draw(conversations(takes_system=published.takes_system))
    for (name, family), model in models.items():
        if name != published.name or is_rewritten(conversation, family=family):
            continue
        rendered = model.template.render(conversation)
        read = ConversationsReader(model.tokenizer, template=model.template, rendering="shared").encode([rendered])
        ids, ends, text = read.segments.token_ids_T.tolist(), [0, *read.segments.byte_ends_T.tolist()], rendered.text.encode()
        special_V = model.tokenizer.token_bytes.is_special_V
        controls = {model.tokenizer.backend.token_to_id(token) for token in (*published.special, *published.added)}
        for place, token_id in enumerate(ids):
            if token_id in controls:
                continue
            assert not special_V[token_id]
            of_token, of_text = model.tokenizer.token_bytes[token_id], text[ends[place] : ends[place + 1]]
            if published.right_strips and place and ids[place - 1] == model.tokenizer.backend.token_to_id(published.end_of_turn):
                of_text = of_text.lstrip()  # which the end-of-turn token has taken
            may_have_space = place == 0 or (family == "sentencepiece" and ids[place - 1] in controls)
            is_with_space = family in ("sentencepiece", "metaspace") and may_have_space and of_token == b" " + of_text
            assert of_token == of_text or is_with_space


@several
@given(data=st.data())
def test_other_models_read_the_same_answers_and_end_them_with_their_own_token(models, data: st.DataObject) -> None:
    writer = data.draw(st.sampled_from(sorted(models)), label="template")
    other = data.draw(st.sampled_from([name for name in sorted(models) if name[0] != writer[0]]), label="reader")
    conversation = data.draw(conversations(takes_system=models[writer].published.takes_system))
    rendered = models[writer].template.render(conversation)
    mine, theirs = models[other], models[writer]
    reader = ConversationsReader(mine.tokenizer, template=theirs.template, rendering="foreign", own=mine.template)
    ids, trained_on = labelled(reader, rendered)
    answers = [message.text for message in conversation if message.role == "assistant"]
    assert trained_on == "".join(theirs.published.written(text) + theirs.published.end_of_turn for text in answers).encode()
    same_spelling = mine.tokenizer.backend.token_to_id(theirs.published.end_of_turn) is not None and (
        theirs.published.end_of_turn in mine.published.special
    )
    ending = theirs.published.end_of_turn if same_spelling else mine.published.end_of_turn
    assert ids.count(mine.tokenizer.backend.token_to_id(ending)) == len(answers)


@several
@given(data=st.data())
def test_a_rendering_of_its_own_is_placed_in_the_shared_text(models, data: st.DataObject) -> None:
    writer = data.draw(st.sampled_from(sorted(models)), label="template")
    other = data.draw(st.sampled_from([name for name in sorted(models) if name[0] != writer[0]]), label="reader")
    conversation = data.draw(conversations(takes_system=False))
    rendered = models[writer].template.render(conversation)
    mine = models[other]
    read = ConversationsReader(mine.tokenizer, template=mine.template, rendering="own").encode([rendered])
    assert read.segments.is_lossless_S.all(), read.reasons
    ends, data_B = read.segments.byte_ends_T, rendered.text.encode()
    assert (np.diff(ends) >= 0).all()
    place = rendered.byte_offsets()
    is_answer_B = np.zeros(len(data_B), np.bool_)
    for each in rendered.messages:
        if each.role == "assistant":
            is_answer_B[place(each.start) : place(each.end)] = True
    spans = [(ends[j], ends[j + 1]) for j in np.flatnonzero(read.label_mask_T)]
    said = b"".join(bytes(byte for byte, is_answer in zip(data_B[a:b], is_answer_B[a:b], strict=True) if is_answer) for a, b in spans)
    shared = [rendered.text[each.start : each.end] for each in rendered.messages if each.role == "assistant"]
    expected = "".join(text.strip() if mine.published.strips else text for text in shared).encode()
    assert b"".join(said.split()) == b"".join(expected.split())
    if not mine.published.strips:
        assert said == expected
    if not is_rewritten(conversation, family=other[1]) and not mine.published.after:
        ids = read.segments.token_ids_T.tolist()
        for j in np.flatnonzero(read.label_mask_T).tolist():
            a, b = ends[j], ends[j + 1]
            if read.label_mask_T[j - 1] and is_answer_B[a:b].all():  # inside the answer its bytes are the message's
                assert mine.tokenizer.token_bytes[ids[j + 1]] == data_B[a:b]


@several
@given(data=st.data(), context_length=st.integers(24, 80))
def test_segments_keep_text_masks_and_control_tokens(models, data: st.DataObject, context_length: int) -> None:
    name = data.draw(st.sampled_from(sorted(models)))
    conversation = data.draw(conversations(takes_system=models[name].published.takes_system))
    rendered = models[name].template.render(conversation)
    reader = ConversationsReader(models[name].tokenizer, template=models[name].template, rendering="shared")
    (segments,) = segment_conversations([rendered], readers=[reader], context_length=context_length)
    assert "".join(segment.text for segment in segments) == rendered.text
    assert all(segment.text for segment in segments)
    assert (reader.lengths(segments) <= context_length).all()
    for spans in ("control_spans", "assistant_spans"):
        whole = [rendered.text[start:end] for start, end in getattr(rendered, spans)]
        cut = [segment.text[start:end] for segment in segments for start, end in getattr(segment, spans)]
        assert "".join(cut) == "".join(whole)
        assert spans == "assistant_spans" or cut == whole
    for other in list(models.values())[::5]:  # reads them in its own template, or says why not
        found = ConversationsReader(other.tokenizer, template=other.template, rendering="own").encode(segments)
        assert (found.segments.is_lossless_S == [s not in found.reasons for s in range(len(segments))]).all()
    whole_messages = {(each.start, each.end) for each in rendered.messages}
    before = 0
    for segment in segments:
        for each in segment.messages:
            assert each.is_whole == ((before + each.start, before + each.end) in whole_messages)
        before += len(segment.text)
    table = pl.DataFrame({"text": [segment.text for segment in segments]}).with_columns(**columns_of(segments))
    assert segments_of(table) == segments
