"""Position maps against a search over all pairs of positions."""

from itertools import pairwise

import numpy as np
from fuseline.align.positions import Ends, match_segments, span_positions
from fuseline.store.tokenizer import Tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

quick = settings(max_examples=300, deadline=None)


@st.composite
def tokenizations(draw, n_bytes: int):
    """Byte offsets at which the tokens of a segment end: ascending, the last at the end; a bos or dummy token ends at 0."""
    ends = draw(st.lists(st.integers(0, n_bytes), max_size=12)) + [0] * draw(st.integers(0, 2))
    if draw(st.booleans()):
        ends += [n_bytes] * draw(st.integers(1, 2))  # tokens without text may follow
    return sorted(ends)


@st.composite
def parts(draw):
    """The segments of a corpus part, and which of them each side has: (doc, segment) -> (bytes, ends)."""
    lengths = draw(st.lists(st.integers(1, 4), max_size=4))
    keys = [(doc * 3 + 7, segment) for doc, n_segments in enumerate(lengths) for segment in range(n_segments)]
    sizes = {key: draw(st.integers(0, 15)) for key in keys}
    sides = []
    for _ in range(2):
        held = [key for key in keys if draw(st.integers(0, 4))]
        sides.append({key: draw(tokenizations(sizes[key])) for key in held})
    return sizes, *sides


def arrays(side: dict) -> dict:
    return {
        "ends_T": np.array([end for ends in side.values() for end in ends], np.int64),
        "offsets": np.cumsum([0, *map(len, side.values())]),
        "doc_id_S": np.array([doc for doc, _ in side], np.int64),
        "segment_S": np.array([segment for _, segment in side], np.uint32),
    }


def mapped(sizes: dict, source: dict, target: dict) -> tuple[list[int], list[int]]:
    left, right = arrays(source), arrays(target)
    of_S = match_segments(
        source_doc_id_S=left["doc_id_S"], source_segment_S=left["segment_S"],
        target_doc_id_S=right["doc_id_S"], target_segment_S=right["segment_S"],
    )  # fmt: skip
    ends = Ends(
        source_ends_T=left["ends_T"], source_offsets=left["offsets"], target_ends_T=right["ends_T"], target_offsets=right["offsets"],
        source_segment_of_S=of_S, n_bytes_S=np.array([sizes[key] for key in target], np.uint32),
    )  # fmt: skip
    position_T = span_positions(ends)
    assert position_T.dtype == np.int32
    return of_S.tolist(), position_T.tolist()


def by_search(source: dict, target: dict) -> list[int]:
    places = [(key, end) for key, ends in source.items() for end in ends]
    expected = []
    for key, ends in target.items():
        for index, end in enumerate(ends):
            same = [u for u, place in enumerate(places) if place == (key, end)]
            is_last = end not in ends[index + 1 :]
            expected.append(same[-1] if same and is_last else -1)
    return expected


@quick
@given(parts())
def test_positions_are_those_of_a_search(part):
    sizes, source, target = part
    of_S, position_T = mapped(sizes, source, target)
    assert of_S == [list(source).index(key) if key in source else -1 for key in target]
    assert position_T == by_search(source, target)
    aligned = [u for u in position_T if u >= 0]
    assert aligned == sorted(set(aligned)), "not strictly monotonic"


@quick
@given(parts())
def test_a_model_is_aligned_to_itself_everywhere_but_before_its_tokens_without_text(part):
    sizes, source, _ = part
    _, position_T = mapped(sizes, source, source)
    ends = [(key, end) for key, ends in source.items() for end in ends]
    assert position_T == [t if place != after else -1 for t, (place, after) in enumerate(pairwise([*ends, None]))]


@quick
@given(parts())
def test_swapping_source_and_target_gives_the_inverse(part):
    sizes, source, target = part
    _, there = mapped(sizes, source, target)
    _, back = mapped(sizes, target, source)
    assert {(t, u) for t, u in enumerate(there) if u >= 0} == {(t, u) for u, t in enumerate(back) if t >= 0}


def test_segments_of_equal_length_are_not_mistaken_for_one_another():
    sizes = {(0, 0): 4, (0, 1): 4, (1, 0): 4, (2, 0): 0, (3, 0): 4}
    source = {(0, 1): [2, 4], (2, 0): [0], (3, 0): [1, 4]}
    target = {(0, 0): [2, 4], (0, 1): [2, 4], (1, 0): [1, 4], (2, 0): [0], (3, 0): [2, 4]}
    assert mapped(sizes, source, target) == ([-1, 0, -1, 1, 2], [-1, -1, 0, 1, -1, -1, 2, -1, 4])


def test_large_document_numbers_do_not_collide():
    few, many = np.array([2**40, 2**40 + 1]), np.array([2**40 - 1, 2**40, 2**40 + 1])
    of_S = match_segments(
        source_doc_id_S=few, source_segment_S=np.array([70_000, 0], np.uint32),
        target_doc_id_S=many, target_segment_S=np.array([70_000, 70_000, 0], np.uint32),
    )  # fmt: skip
    assert of_S.tolist() == [-1, 0, 1]


@settings(max_examples=60, deadline=None)
@given(segments=st.lists(st.text(max_size=30).filter(lambda text: "▁" not in text), min_size=1, max_size=4))
def test_real_tokenizers_share_positions_exactly_where_their_prefixes_decode_to_the_same_text(
    byte_level_folder, sentencepiece_folder, segments
):
    sides = []
    for folder in (sentencepiece_folder, byte_level_folder):
        tokenizer = Tokenizer.from_model_folder(folder)
        encoded = tokenizer.encode_segments(segments)
        side = {}
        for s, segment in enumerate(segments):
            ids = encoded.token_ids_T[encoded.segment_offsets[s] : encoded.segment_offsets[s + 1]].tolist()
            prefixes = [b"".join(tokenizer.token_bytes[token_id] for token_id in ids[: end + 1]) for end in range(len(ids))]
            if tokenizer.has_dummy_prefix and segment:
                prefixes = [prefix[1:] for prefix in prefixes]
            side[s, 0] = [len(prefix) for prefix in prefixes]
            assert all(segment.encode().startswith(prefix) for prefix in prefixes)
        ends_T = tokenizer.byte_ends(encoded.token_ids_T, segment_offsets=encoded.segment_offsets, n_bytes_S=encoded.n_bytes_S)
        assert ends_T.tolist() == arrays(side)["ends_T"].tolist()
        sides.append(side)
    _, position_T = mapped({(s, 0): len(segment.encode()) for s, segment in enumerate(segments)}, *sides)
    assert position_T == by_search(*sides)
