"""Packs hold every token once, are never too long, and are found one by one as in a row, for any lengths of segments."""

import numpy as np
from fuseline.train.labels import LabelRuns
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


@st.composite
def labelled_parts(draw) -> tuple[list[list[int]], list[np.ndarray]]:
    """Lengths of segments of parts, and which of their positions have a label: few runs, as conversations have."""
    parts = draw(PARTS)
    masks = []
    for lengths in parts:
        edges = draw(st.lists(st.integers(0, sum(lengths)), max_size=8))
        masks.append((np.searchsorted(np.sort(edges), np.arange(sum(lengths)), side="right") % 2).astype(np.uint8))
    return parts, masks


def places_of(packs, *, first, stop, index, ends):
    """Segment, first token among all, and length of the pieces of a pack."""
    for p in range(first, stop):
        block, segment = packs.block_P[p], packs.segment_P[p]
        begin_of_block = ends[index.first_B1[block]]
        yield segment, begin_of_block + packs.start_P[p], packs.length_P[p]


def runs_of(parts, masks) -> LabelRuns:
    return LabelRuns.joined(
        [LabelRuns.of_mask(mask, segment_offsets=np.cumsum([0, *lengths])) for lengths, mask in zip(parts, masks, strict=True)]
    )


@given(labelled=labelled_parts(), packing=PACKINGS, seed=st.integers(0, 99), begin=st.integers(0, 50), size=st.integers(1, 20))
@settings(max_examples=150, deadline=None)
def test_every_label_is_packed_once_and_every_pack_has_one(labelled, packing, seed, begin, size):
    parts, masks = labelled

    def order():
        return PackOrder(index_of(parts), packing=packing, sequence_length=16, seed=seed, labels=runs_of(parts, masks))

    ends = np.cumsum([0, *(length for lengths in parts for length in lengths)])
    has_label = np.concatenate(masks).astype(int)
    has_label[ends[1:][np.diff(ends) > 0] - 1] = 0  # nothing follows
    if not order().n_packs(0):
        assert not has_label.any()
        return
    packs, seen = order().packs(0, order().n_packs(0)), np.zeros(len(has_label), int)
    for first, stop in zip(packs.offsets_N1, packs.offsets_N1[1:], strict=False):
        labels = 0
        for _, start, length in places_of(packs, first=first, stop=stop, index=index_of(parts), ends=ends):
            seen[start : start + length] += 1
            labels += has_label[start : start + length].sum()
        assert labels
    assert (seen[has_label == 1] == 1).all()
    assert seen.max() == 1
    whole, again = order().packs(0, begin + size), order().packs(begin, begin + size)
    assert np.array_equal(whole[begin : begin + size].start_P, again.start_P)


@given(parts=PARTS, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_where_every_position_has_a_label_nothing_changes(parts, seed):
    """Packs are those of text without a mask, but for segments of one token, which have no label."""
    parts = [[length for length in lengths if length != 1] for lengths in parts]
    if sum(map(sum, parts)) < 2:
        return
    masks = [np.ones(sum(lengths), np.uint8) for lengths in parts]
    plain, masked = (
        PackOrder(index_of(parts), packing="isolated", sequence_length=16, seed=seed, labels=labels)
        for labels in (None, runs_of(parts, masks))
    )
    assert plain.n_packs(0) == masked.n_packs(0)
    one, other = (each.packs(0, 2 * plain.n_packs(0)) for each in (plain, masked))
    assert np.array_equal(one.start_P, other.start_P)
    assert np.array_equal(one.offsets_N1, other.offsets_N1)
