"""Text to segments to tokens and back: no byte is lost, no text becomes a control token, every context is kept."""

import json
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
from fuseline.ingest.segment import segment_documents
from fuseline.store.errors import DataError
from fuseline.store.tokenizer import Tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

HARD = [
    "", " ", "  ", "\n", "\n\n", " \n \n", "\r\n", "\t", "\0", "\u00a0", "\u2003", "\u3000", "\u200b", "\ufeff", "\u2028", "\x85",
    "the ", " and",
    "def f(x):\n    return x\n", "1234567890", "naïve", "e\u0301\u0323", "𝔘𝔫𝔦", "👩‍👩‍👧‍👦", "🇨🇭", "漢字かな交じり文", "한국어",
    "مرحبا", "ﬁ", "Å", "\U0010ffff", "\ue000", "</s>", "<s>", "<unk>", "<|endoftext|>", "<|im_start|>user\n", "<|im_end|>", "<0x41>",
    "Ġ", "Ċ", "\\n", "%",
]  # fmt: skip
texts = st.lists(st.sampled_from(HARD) | st.text(max_size=20), max_size=25).map("".join)
plain_texts = texts.filter(lambda text: "▁" not in text)
long_texts = st.builds("".join, st.lists(plain_texts, min_size=3, max_size=12))
quick = settings(max_examples=120, deadline=None)


@pytest.fixture(scope="module")
def byte_level(byte_level_folder) -> Tokenizer:
    return Tokenizer.from_model_folder(byte_level_folder)


@pytest.fixture(scope="module")
def sentencepiece(sentencepiece_folder) -> Tokenizer:
    return Tokenizer.from_model_folder(sentencepiece_folder)


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def tokenizer(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


def bytes_of_tokens(tokenizer: Tokenizer) -> dict[int, bytes]:
    """An oracle: the bytes of every token that is text, from the strings of the vocabulary by the rules of the two families."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    special = {token_id for token_id, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    table = {}
    for token, token_id in tokenizer.backend.get_vocab().items():
        if token_id in special:
            continue
        if tokenizer.is_byte_level:
            table[token_id] = bytes(byte_of[char] for char in token)
        elif token.startswith("<0x") and len(token) == 6:
            table[token_id] = bytes.fromhex(token[3:5])
        else:
            table[token_id] = token.replace("▁", " ").encode()
    return table


def test_every_token_that_is_text_has_its_bytes_and_every_other_has_none(tokenizer):
    expected = bytes_of_tokens(tokenizer)
    assert tokenizer.token_bytes.to_list() == [expected.get(token_id, b"") for token_id in range(tokenizer.vocab_size)]
    special = [token_id for token_id in range(tokenizer.vocab_size) if token_id not in expected]
    assert np.flatnonzero(tokenizer.token_bytes.is_special_V).tolist() == special
    assert len(special) == 3


@quick
@given(documents=st.lists(long_texts, max_size=4), context_length=st.integers(16, 40))
@example(documents=["", "\0", " " * 500, "\n" * 500, "👩‍👩‍👧‍👦" * 30], context_length=16)
def test_segments_give_back_the_document_and_fit_every_context(byte_level, sentencepiece, documents, context_length):
    segmented = segment_documents(documents, tokenizers=[byte_level, sentencepiece], context_length=context_length)
    assert ["".join(segments) for segments in segmented] == documents
    for document, segments in zip(documents, segmented, strict=True):
        assert segments == [document] or all(segments), "an empty segment"
    for tokenizer in (byte_level, sentencepiece):
        for segments in segmented:
            encoded = tokenizer.encode_segments(segments)
            assert max(np.diff(encoded.segment_offsets), default=0) <= context_length
            assert encoded.is_lossless_S.all()
            decoded = tokenizer.decode_segments(encoded.token_ids_T, segment_offsets=encoded.segment_offsets, n_bytes_S=encoded.n_bytes_S)
            assert b"".join(decoded) == "".join(segments).encode()


@quick
@given(segments=st.lists(plain_texts, max_size=5))
@example(segments=["</s>", "<s>", "<unk>", "<|endoftext|>", "<|im_start|>", " </s>"])
@example(segments=["", "", " a", "a", ""])
def test_tokens_stand_for_the_text_and_for_nothing_else(tokenizer, segments):
    encoded = tokenizer.encode_segments(segments)
    offsets = encoded.segment_offsets
    assert len(offsets) == len(segments) + 1
    assert encoded.is_lossless_S.tolist() == [True] * len(segments)
    assert encoded.n_bytes_S.tolist() == [len(segment.encode()) for segment in segments]
    table = bytes_of_tokens(tokenizer)
    for segment, start, end in zip(segments, offsets[:-1], offsets[1:], strict=True):
        ids = encoded.token_ids_T[start:end].tolist()
        if tokenizer.prepends_bos:
            assert ids.pop(0) == tokenizer.roles["bos"]
        assert set(ids) <= table.keys(), "a control token came from text"
        text = b"".join(table[token_id] for token_id in ids)
        if tokenizer.has_dummy_prefix and segment:
            assert text[:1] == b" "
            text = text[1:]
        assert text == segment.encode()


@quick
@given(segments=st.lists(plain_texts, min_size=1, max_size=4))
def test_byte_ends_are_where_the_tokens_text_ends(tokenizer, segments):
    encoded = tokenizer.encode_segments(segments)
    ends_T = tokenizer.byte_ends(encoded.token_ids_T, segment_offsets=encoded.segment_offsets, n_bytes_S=encoded.n_bytes_S)
    table = bytes_of_tokens(tokenizer)
    for s, segment in enumerate(segments):
        start, end = encoded.segment_offsets[s : s + 2]
        read, expected = 0, []
        for token_id in encoded.token_ids_T[start:end].tolist():
            read += len(table.get(token_id, b""))
            expected.append(read)
        dummy = read - len(segment.encode())
        assert dummy == (tokenizer.has_dummy_prefix and segment != "")
        assert ends_T[start:end].tolist() == [max(end - dummy, 0) for end in expected]


@quick
@given(segment=plain_texts)
def test_byte_ends_agree_with_the_offsets_of_the_tokenizers_library(tokenizer, segment):
    encoded = tokenizer.encode_segments([segment])
    ends_T = tokenizer.byte_ends(encoded.token_ids_T, segment_offsets=encoded.segment_offsets, n_bytes_S=encoded.n_bytes_S)
    offsets = tokenizer.backend.encode(segment, add_special_tokens=False).offsets
    ends = ends_T[int(tokenizer.prepends_bos) :].tolist()
    assert len(ends) == len(offsets)
    for index, (_, end) in enumerate(offsets):
        if index + 1 == len(offsets) or offsets[index + 1][0] >= end:  # the token does not end inside a character
            assert ends[index] == len(segment[:end].encode())


def test_a_dummy_prefix_that_is_left_out_before_a_space_is_seen_segment_by_segment(sentencepiece):
    """Metaspace, unlike SentencePiece, puts no second space before a text that starts with one."""
    definition = json.loads(sentencepiece.definition)
    definition |= {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False},
    }
    tokenizer = Tokenizer(json.dumps(definition), roles=sentencepiece.roles, prepends_bos=True)
    segments = ["of text", " of text", "", "  of", "of\ntext "]
    encoded = tokenizer.encode_segments(segments)
    assert encoded.is_lossless_S.all()
    first, second = (encoded.token_ids_T[start:end].tolist() for start, end in pairwise(encoded.segment_offsets[:3]))
    assert first == second, "the case does not arise"
    ends_T = tokenizer.byte_ends(encoded.token_ids_T, segment_offsets=encoded.segment_offsets, n_bytes_S=encoded.n_bytes_S)
    table = bytes_of_tokens(tokenizer)
    for segment, start, end in zip(segments, encoded.segment_offsets[:-1], encoded.segment_offsets[1:], strict=True):
        lengths = [len(table.get(token_id, b"")) for token_id in encoded.token_ids_T[start:end].tolist()]
        dummy = int(segment != "" and not segment.startswith(" "))
        assert ends_T[start:end].tolist() == [max(sum(lengths[: j + 1]) - dummy, 0) for j in range(len(lengths))]


def test_a_megabyte_without_a_space(byte_level, sentencepiece):
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz0123456789"), 1_000_000))
    (segments,) = segment_documents([text], tokenizers=[byte_level, sentencepiece], context_length=2048)
    assert "".join(segments) == text
    for tokenizer in (byte_level, sentencepiece):
        lengths_S = np.diff(tokenizer.encode_segments(segments).segment_offsets)
        assert lengths_S.max() <= 2048
        assert np.median(lengths_S) > 1024, "segments much shorter than the context waste it"


@pytest.mark.parametrize("bad", ["\ud800", "a\udfffb", "\udc00\ud800", "fine " * 100 + "\ud83d"])
def test_a_lone_surrogate_is_reported_with_the_text_it_is_in(tokenizer, bad):
    for entrance in (
        tokenizer.encode,
        tokenizer.encode_segments,
        lambda documents: segment_documents(documents, tokenizers=[tokenizer], context_length=16),
    ):
        with pytest.raises(DataError, match=r"Text 1 of 3 is not valid Unicode .*surrogates not allowed"):
            entrance(["fine", bad, "fine too"])


@pytest.mark.parametrize("boundary", ["\n\n", "\n \n", "\n", "\r\n", " "])
def test_cuts_are_made_after_paragraphs_else_lines_else_words(byte_level, boundary):
    # Digits come to a token each: 32 tokens reach into the second group, and the best boundary of the second half is the one between.
    weaker = {"\n\n": "\n", "\n \n": "\n", "\n": " ", "\r\n": " ", " ": ""}[boundary]
    first, second = "7" * 20 + boundary, "3" * 5 + weaker + "3" * 20
    assert segment_documents([first + second], tokenizers=[byte_level], context_length=32) == [[first, second]]


def test_a_cut_inside_a_token_still_fits(tmp_path):
    """A tokenizer whose tokens span words: what ends in the middle of such a token has more tokens than the token's one."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = {token: index for index, token in enumerate(["<unk>", "▁", *letters, *(f"▁{char}" for char in letters)])}
    merges = [("▁", char) for char in letters]
    for char in letters:
        vocabulary[f"{char}▁{char}"] = len(vocabulary)
        merges.append((char, f"▁{char}"))
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>"))
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    tokenizer = Tokenizer(backend.to_str(), roles=dict.fromkeys(("bos", "eos", "pad", "unk")), prepends_bos=False)
    text = "".join(f"{char} {char}" for char in letters)
    assert len(tokenizer.encode([text])[0]) == len(letters)
    (segments,) = segment_documents([text], tokenizers=[tokenizer], context_length=16)
    assert "".join(segments) == text
    assert max(map(len, tokenizer.encode(segments))) <= 16


@quick
@given(segments=st.lists(plain_texts, max_size=6), data=st.data())
def test_selecting_segments_is_encoding_those_alone(tokenizer, segments, data):
    keep = data.draw(st.lists(st.booleans(), min_size=len(segments), max_size=len(segments)))
    selected = tokenizer.encode_segments(segments).select(np.array(keep, bool))
    alone = tokenizer.encode_segments([segment for segment, kept in zip(segments, keep, strict=True) if kept])
    for name in ("token_ids_T", "segment_offsets", "n_bytes_S", "is_lossless_S"):
        np.testing.assert_array_equal(getattr(selected, name), getattr(alone, name))


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    loaded = Tokenizer.load(tmp_path / "tokenizer")
    assert (loaded.digest, loaded.roles, loaded.prepends_bos) == (tokenizer.digest, tokenizer.roles, tokenizer.prepends_bos)
    text = ["".join(HARD)]
    np.testing.assert_array_equal(loaded.encode_segments(text).token_ids_T, tokenizer.encode_segments(text).token_ids_T)
