"""Packs hold every token once, are never too long, and are found one by one as in a row, for any lengths of segments."""

import numpy as np
from fuseline.train.order import PackOrder, SegmentIndex
from fuseline.train.packing import count_packs, pack
from hypothesis import given, settings
from hypothesis import strategies as st

PACKINGS = st.sampled_from(["isolated", "concatenated"])
PARTS = st.lists(st.lists(st.integers(0, 70), max_size=30), min_size=1, max_size=40).filter(lambda parts: max(map(sum, parts)) > 1)


def index_of(parts: list[list[int]]) -> SegmentIndex:
    return SegmentIndex.of({3 * i: np.cumsum([0, *lengths]) for i, lengths in enumerate(parts)})


@given(parts=PARTS)
@settings(max_examples=60, deadline=None)
def test_the_index_finds_every_segment(parts):
    index = index_of(parts)
    blocks = np.random.default_rng(0).permutation(len(index.part_B))
    segments = index.segments(blocks)
    found = {}
    for block, segment, start, length in zip(*(getattr(segments, name).tolist() for name in segments.__slots__), strict=True):
        number = int(index.number_B[block] + segment - index.first_B1[block])
        found[int(index.part_B[block]), number] = (int(index.row_B[block]) + start, length)
    expected = {}
    for i, lengths in enumerate(parts):
        ends = np.cumsum([0, *lengths]).tolist()
        expected |= {(3 * i, number): (ends[number], length) for number, length in enumerate(lengths)}
    assert found == expected


@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=60),
    packing=PACKINGS,
    sequence_length=st.integers(2, 40),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_every_token_is_packed_once(lengths, packing, sequence_length, seed):
    index = index_of([lengths])
    segments = index.segments(np.arange(len(index.part_B)))
    packs = pack(segments, packing=packing, sequence_length=sequence_length, random=np.random.default_rng(seed))
    assert len(packs) == count_packs(segments.length_S[::-1].copy(), packing=packing, sequence_length=sequence_length)
    sizes = [int(packs.length_P[first:stop].sum()) for first, stop in zip(packs.offsets_N1, packs.offsets_N1[1:], strict=False)]
    assert all(0 < size <= sequence_length for size in sizes)
    if packing == "concatenated":
        assert sum(size < sequence_length for size in sizes) <= 1
    ends = np.cumsum([0, *lengths])
    seen = np.zeros(ends[-1], int)
    for segment, start, length, is_end in zip(packs.segment_P, packs.start_P, packs.length_P, packs.ends_segment_P, strict=True):
        assert ends[segment] <= start < start + length <= ends[segment + 1]
        assert is_end == (start + length == ends[segment + 1])
        seen[start : start + length] += 1
    if packing == "isolated":
        # A last token that would be a piece by itself predicts nothing: it is left out, and is the label of the piece before.
        seen[ends[1:][np.array(lengths) % sequence_length == 1] - 1] += 1
    assert (seen == 1).all()


@given(parts=PARTS, packing=PACKINGS, seed=st.integers(0, 99), begin=st.integers(0, 200), size=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_packs_are_found_one_by_one_as_in_a_row(parts, packing, seed, begin, size):
    def order():
        return PackOrder(index_of(parts), packing=packing, sequence_length=16, seed=seed)

    if not order().n_packs(0):
        return
    whole, fresh = order().packs(0, begin + size), order()
    several = fresh.packs(begin, begin + size)
    assert len(several) == size
    alone = [fresh.packs(begin + i, begin + i + 1) for i in reversed(range(size))][::-1]
    for i in range(size):
        for packs in (several[i : i + 1], alone[i]):
            expected = whole[begin + i : begin + i + 1]
            assert np.array_equal(packs.segment_P, expected.segment_P)
            assert np.array_equal(packs.start_P, expected.start_P)
            assert np.array_equal(packs.length_P, expected.length_P)
