"""Tokenizers of every family read any text: what they rewrite is placed in it, or is reported; and their positions agree."""

import itertools
import unicodedata

import numpy as np
import pytest
from fuseline.align.positions import Ends, cover_positions, match_segments, span_positions
from fuseline.store.equivalence import places_in_text
from fuseline.store.errors import DataError
from fuseline.store.tokenizer import Tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.tiny import train_composing, train_lossy_unigram, train_unigram, train_wordpiece

COMPOSING = ["e\u0301", "é", "e\u0323\u0301", "각", "\u1100\u1161\u11a8", "\u212b", "\u0958", "\u0344", "ﬁ", "▁", " ▁", "▁ "]
characters = st.sampled_from([*COMPOSING, " ", "\n", "a", "漢", "\U0001f600", "</s>", "<|endoftext|>", "the ", "1"]) | st.text(max_size=4)
texts = st.lists(characters, max_size=12).map("".join)
quick = settings(max_examples=100, deadline=None)


@pytest.fixture(scope="module")
def families(tmp_path_factory, corpus_texts, byte_level_folder, sentencepiece_folder) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("families")
    folders = {
        "byte-level": byte_level_folder,
        "composing": train_composing(folder / "composing", texts=corpus_texts),
        "dummy prefix": sentencepiece_folder,
        "unigram": train_unigram(folder / "unigram", texts=corpus_texts),
    }
    return {name: Tokenizer.from_model_folder(path) for name, path in folders.items()}


def equivalent(data: bytes) -> str:
    return unicodedata.normalize("NFC", data.decode(errors="surrogateescape").replace("▁", " "))


def ends_of(tokenizer: Tokenizer, encoded, *, dummy_prefix: bool) -> np.ndarray:
    if encoded.byte_ends_T is not None:
        return np.maximum(encoded.byte_ends_T, -1 if dummy_prefix else 0).astype(np.int64)
    return tokenizer.byte_ends(
        encoded.token_ids_T, segment_offsets=encoded.segment_offsets, n_bytes_S=encoded.n_bytes_S, dummy_prefix=dummy_prefix
    )


@settings(max_examples=600, deadline=None)
@given(text=texts)
@example(text="".join(COMPOSING))
def test_what_is_composed_is_placed_where_it_was(text):
    composed = unicodedata.normalize("NFC", text)
    places = places_in_text(text, rewritten=composed.encode())
    assert places[-1] == len(text.encode())
    assert (np.diff(places) >= 0).all()
    for prefix in range(len(composed) + 1):
        at = len(composed[:prefix].encode())
        if at + 1 == len(places) or places[at + 1] > places[at]:  # else it ends inside of what was composed
            assert unicodedata.normalize("NFC", text.encode()[: places[at]].decode()) == composed[:prefix]


@pytest.mark.parametrize("rewritten", ["ab", "abcd", "a b", "ABC"])
def test_another_text_is_no_equivalent(rewritten):
    assert places_in_text("abc", rewritten=rewritten.encode()) is None


@quick
@given(segments=st.lists(texts, min_size=1, max_size=4))
def test_every_family_reads_every_text(families, segments):
    for name, tokenizer in families.items():
        encoded = tokenizer.encode_segments(segments)
        # A Unigram model has its control tokens among its pieces: a text that holds one is reported, and left out.
        is_readable_S = [name != "unigram" or "</s>" not in text for text in segments]
        assert encoded.is_lossless_S.tolist() == is_readable_S, name
        encoded, readable = encoded.select(encoded.is_lossless_S), list(itertools.compress(segments, is_readable_S))
        ends_T, table = ends_of(tokenizer, encoded, dummy_prefix=False), tokenizer.token_bytes
        for text, (start, end) in zip(readable, itertools.pairwise(encoded.segment_offsets), strict=True):
            ids_T = encoded.token_ids_T[start:end]
            assert not table.is_special_V[ids_T[int(tokenizer.prepends_bos) :]].any(), "a control token came from text"
            data, read = text.encode(), table.concatenate(ids_T).tobytes()
            n_dummy = int(tokenizer.has_dummy_prefix and text != "")
            assert equivalent(read[n_dummy:]) == equivalent(data)
            for t, is_complete in enumerate(np.append(np.diff(ends_T[start:end]) > 0, True)[: len(ids_T)]):
                if is_complete:  # else the token ends inside a character that was composed
                    prefix = table.concatenate(ids_T[: t + 1]).tobytes()[n_dummy:]
                    assert equivalent(data[: ends_T[start + t]]) == equivalent(prefix)


@quick
@given(segments=st.lists(texts.filter(lambda text: "</s>" not in text), min_size=1, max_size=3), data=st.data())
def test_positions_of_any_two_families_have_read_the_same_text(families, segments, data):
    source, target = (families[data.draw(st.sampled_from(sorted(families)))] for _ in range(2))
    left, right = source.encode_segments(segments), target.encode_segments(segments)
    keys = {"doc_id": np.arange(len(segments)), "segment": np.zeros(len(segments), np.uint32)}
    of_S = match_segments(
        source_doc_id_S=keys["doc_id"], source_segment_S=keys["segment"], target_doc_id_S=keys["doc_id"], target_segment_S=keys["segment"]
    )
    shared = {
        "source_offsets": left.segment_offsets, "target_offsets": right.segment_offsets, "source_segment_of_S": of_S,
        "n_bytes_S": right.n_bytes_S,
    }  # fmt: skip
    ends = [[ends_of(side, part, dummy_prefix=dummy) for side, part in ((source, left), (target, right))] for dummy in (False, True)]
    span_T = span_positions(Ends(source_ends_T=ends[0][0], target_ends_T=ends[0][1], **shared))
    cover_T, ahead_T = cover_positions(Ends(source_ends_T=ends[1][0], target_ends_T=ends[1][1], **shared))
    for s, text in enumerate(segments):
        here = slice(*right.segment_offsets[s : s + 2])
        for position_T in (span_T[here], cover_T[here]):
            known = position_T[position_T >= 0]
            assert (np.diff(known) >= 0).all(), "not monotonic"
            assert ((known >= left.segment_offsets[s]) & (known < left.segment_offsets[s + 1])).all(), "of another segment"
        for t in range(here.start, here.stop):
            if span_T[t] >= 0:
                assert ends[0][0][span_T[t]] == ends[0][1][t]
            if cover_T[t] >= 0:
                later = ends[1][0][cover_T[t] + 1 : left.segment_offsets[s + 1]]
                end = ends[1][0][cover_T[t]] + int(ahead_T[t])
                assert end == max(ends[1][1][t], ends[1][0][left.segment_offsets[s]] if end < 0 else 0)
                assert (later > end).all(), "a later source position has read no more"
        if source is target and len(text):
            same = [t for t in range(here.start, here.stop) if span_T[t] >= 0]
            assert span_T[same].tolist() == same
            assert here.stop - 1 in same


def test_a_tokenizer_that_loses_text_is_refused_or_says_of_which_text(tmp_path, corpus_texts):
    with pytest.raises(DataError, match="WordPiece"):
        Tokenizer.from_model_folder(train_wordpiece(tmp_path / "wordpiece", texts=corpus_texts))
    tokenizer = Tokenizer.from_model_folder(train_lossy_unigram(tmp_path / "lossy", texts=corpus_texts))
    kept = tokenizer.encode_segments(["some text", "two\nlines", "two  spaces", "ﬁ", "\U0001f600", "more of it"])
    assert kept.is_lossless_S.tolist() == [True, False, False, False, False, True]
