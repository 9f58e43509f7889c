"""Dynamic time warping against the textbook's, and the rules of agreement against their definitions."""

from itertools import pairwise

import numpy as np
import pytest
from fuseline.align import dtw
from fuseline.align.dtw import Matches, Side, Spellings, agreeing_positions, warp
from fuseline.align.matches import count_pairs
from fuseline.store.tokenizer import Tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from support.textbook import warping

quick = settings(max_examples=150, deadline=None)
BOS = 0  # id of the bos of either side, where it has one
SOURCE_MARK, TARGET_MARK = "Ġ", "▁"
bodies = st.text(alphabet="ab", min_size=0, max_size=3)


@st.composite
def vocabularies(draw, mark: str):
    """Different pieces, some with a word-start mark; the first is bos."""
    words = draw(st.lists(st.tuples(st.booleans(), bodies), min_size=1, max_size=6, unique=True))
    return ["<s>", *(mark * starts + body for starts, body in words)]


@st.composite
def parts(draw):
    """Both sides' pieces and segments, which source segment belongs to each target segment, and which sides begin with bos."""
    pieces = draw(vocabularies(SOURCE_MARK)), draw(vocabularies(TARGET_MARK))
    has_bos = draw(st.booleans()), draw(st.booleans())
    n = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    sides = [
        [
            [BOS] * bos + draw(st.lists(st.integers(1, len(vocabulary) - 1), max_size=9))
            for _ in range(n_segments)
        ]
        for vocabulary, bos, n_segments in zip(pieces, has_bos, n, strict=True)
    ]  # fmt: skip
    order = sorted(draw(st.sets(st.integers(0, n[0] - 1), max_size=n[1]))) if n[0] else []
    place = sorted(draw(st.permutations(range(n[1])))[: len(order)])
    source_of = [-1] * n[1]
    for target_segment, source_segment in zip(place, order, strict=False):
        source_of[target_segment] = source_segment
    return pieces, sides, source_of, has_bos


def side(segments: list[list[int]], *, has_bos: bool) -> Side:
    ids = np.array([token for segment in segments for token in segment], np.uint16)
    return Side(token_ids_T=ids, offsets=np.cumsum([0, *map(len, segments)]), bos_id=BOS if has_bos else None)


def spellings_of(pieces) -> Spellings:
    return Spellings.of_pieces(pieces[0], target_pieces=pieces[1], source_word_start=SOURCE_MARK, target_word_start=TARGET_MARK)


def warped(part, *, room: int = 1 << 20) -> tuple[Side, Side, Spellings, Matches]:
    pieces, (source_segments, target_segments), source_of, has_bos = part
    source, target = side(source_segments, has_bos=has_bos[0]), side(target_segments, has_bos=has_bos[1])
    spellings = spellings_of(pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dtw, "_MOVES_BYTES", room)
        patch.setattr(dtw, "_COSTS_BYTES", room)
        matches = warp(source, target=target, source_segment_of_S=np.array(source_of, np.int64), spellings=spellings)
    return source, target, spellings, matches


def expected_runs(part) -> tuple[list[list[int]], list[int]]:
    """For each target position the source positions that are matched with it, by the textbook; and the cost of each segment."""
    pieces, (source_segments, target_segments), source_of, has_bos = part
    starts = np.cumsum([0, *map(len, source_segments)]).tolist()
    runs, costs = [], []
    for segment, of in zip(target_segments, source_of, strict=True):
        if of < 0:
            runs += [[] for _ in segment]
            costs.append(0)
            continue
        other, n_bos = source_segments[of], has_bos[0]
        if has_bos[1]:
            runs.append([starts[of]] if has_bos[0] else [])
        source_text = [pieces[0][token].replace(SOURCE_MARK, "") for token in other[n_bos:]]
        target_text = [pieces[1][token].replace(TARGET_MARK, "") for token in segment[has_bos[1] :]]
        cost, found = warping(source_text, target_text) if source_text and target_text else (0, [[] for _ in target_text])
        runs += [[starts[of] + n_bos + place for place in sources] for sources in found]
        costs.append(cost)
    return runs, costs


def runs_of(matches: Matches) -> list[list[int]]:
    ranges = zip(matches.first_T.tolist(), matches.last_T.tolist(), strict=True)
    return [[] if first < 0 else list(range(first, last + 1)) for first, last in ranges]


@pytest.mark.parametrize("room", [1, 12, 1 << 20], ids=["no room", "little room", "room"])
@quick
@given(part=parts())
def test_the_path_is_that_of_the_textbook_however_little_is_kept(part, room):
    _, _, _, matches = warped(part, room=room)
    assert (runs_of(matches), matches.cost_S.tolist()) == expected_runs(part)
    source_P, target_P = matches.pairs()
    assert list(zip(source_P.tolist(), target_P.tolist(), strict=True)) == [
        (u, t) for t, sources in enumerate(runs_of(matches)) for u in sources
    ]


def agreeing_by_definition(part, runs: list[list[int]], *, match: str, target_ids: list[int]) -> list[int]:
    pieces, (source_segments, target_segments), _, has_bos = part
    source_tokens = [token for segment in source_segments for token in segment]
    targets_of: dict[int, list[int]] = {}
    for t, sources in enumerate(runs):
        for u in sources:
            targets_of.setdefault(u, []).append(t)
    found, t = [], 0
    for segment in target_segments:
        for index, token in enumerate(segment):
            sources = runs[t]
            piece, last = pieces[1][token], source_tokens[sources[-1]] if sources else BOS
            is_bos, is_first = has_bos[1] and index == 0, index == int(has_bos[1])
            respelled = pieces[0][last].replace(SOURCE_MARK, TARGET_MARK)
            mapped = last
            if is_first and piece.startswith(TARGET_MARK) and not respelled.startswith(TARGET_MARK):
                respelled = TARGET_MARK + respelled
                mapped = pieces[0].index(SOURCE_MARK + pieces[0][last]) if SOURCE_MARK + pieces[0][last] in pieces[0] else None
            endings = pieces[0][last].replace(SOURCE_MARK, ""), piece.replace(TARGET_MARK, "")
            if not sources:
                agrees = False
            elif is_bos:
                agrees = True
            elif len(sources) == 1:
                agrees = respelled == piece
                agrees |= match != "em" and mapped is not None and target_ids[mapped] == token
                group = targets_of[sources[0]]
                if match == "fusechat" and len(group) > 1 and group[-1] == t and all(runs[g] == sources for g in group):
                    agrees |= bool(endings[1]) and endings[0].endswith(endings[1])
            else:
                agrees = match == "fusechat" and all(targets_of[u] == [t] for u in sources)
                agrees = agrees and bool(endings[0]) and endings[1].endswith(endings[0])
            found.append(sources[-1] if agrees else -1)
            t += 1
    return found


@pytest.mark.parametrize("match", ["em", "mined", "fusechat"])
@quick
@given(part=parts(), data=st.data())
def test_positions_agree_as_defined_and_never_fall(part, match, data):
    source, target, spellings, matches = warped(part)
    n_source, n_target = (len(pieces) for pieces in part[0])
    ids = data.draw(st.lists(st.integers(-1, n_target - 1), min_size=n_source, max_size=n_source))
    position_T = agreeing_positions(
        matches, source=source, target=target, spellings=spellings, match=match, target_ids_V=np.array(ids, np.int32)
    )
    assert position_T.dtype == np.int32
    assert position_T.tolist() == agreeing_by_definition(part, runs_of(matches), match=match, target_ids=ids)
    aligned = [u for u in position_T.tolist() if u >= 0]
    assert aligned == sorted(aligned)


words = st.lists(st.sampled_from(["a", "b", "ab", "ba", "aab", "bab"]), min_size=1, max_size=6)


@quick
@given(source_words=words, target_words=words)
def test_groups_agree_as_defined(source_words, target_words):
    pieces = ["<s>", *dict.fromkeys(source_words)], ["<s>", *dict.fromkeys(target_words)]
    segments = [
        [vocabulary.index(word) for word in side_words] for vocabulary, side_words in zip(pieces, (source_words, target_words), strict=True)
    ]
    part = (pieces, [[segments[0]], [segments[1]]], [0], (False, False))
    source, target, spellings, matches = warped(part)
    unmapped = [-1] * len(pieces[0])
    position_T = agreeing_positions(
        matches, source=source, target=target, spellings=spellings, match="fusechat", target_ids_V=np.array(unmapped, np.int32)
    )
    assert position_T.tolist() == agreeing_by_definition(part, runs_of(matches), match="fusechat", target_ids=unmapped)


@pytest.mark.parametrize(
    ("source_words", "target_words", "expected"),
    [
        (["abcd"], ["ab", "cd"], [-1, 0]),  # the last of a group of target tokens
        (["ab", "cd"], ["abcd"], [1]),  # of source tokens
        (["ab"], ["b"], [-1]),  # no group, and not equal
        (["abcd"], ["ab", "xx"], [-1, -1]),  # ends otherwise
    ],
)
def test_the_last_token_of_a_group_speaks_if_the_other_ends_with_it(source_words, target_words, expected):
    pieces = ["<s>", *source_words], ["<s>", *dict.fromkeys(target_words)]
    segments = [
        [vocabulary.index(word) for word in side_words] for vocabulary, side_words in zip(pieces, (source_words, target_words), strict=True)
    ]
    source, target, spellings, matches = warped((pieces, [[segments[0]], [segments[1]]], [0], (False, False)))
    position_T = agreeing_positions(matches, source=source, target=target, spellings=spellings, match="fusechat")
    assert position_T.tolist() == expected


@pytest.mark.parametrize("match", ["em", "mined", "fusechat"])
@quick
@given(part=parts())
def test_a_model_is_aligned_to_itself_everywhere(part, match):
    pieces, (segments, _), _, (has_bos, _) = part
    own = ((pieces[0], [piece.replace(SOURCE_MARK, TARGET_MARK) for piece in pieces[0]]), [segments, segments], [*range(len(segments))])
    source, target, spellings, matches = warped((*own, (has_bos, has_bos)))
    identity_V = np.arange(len(pieces[0]), dtype=np.int32)
    position_T = agreeing_positions(matches, source=source, target=target, spellings=spellings, match=match, target_ids_V=identity_V)
    assert position_T.tolist() == list(range(len(source.token_ids_T)))
    assert not matches.cost_S.any()


@quick
@given(part=parts(), seed=st.integers(0, 99))
def test_other_ids_for_the_same_pieces_change_nothing(part, seed):
    pieces, sides, source_of, has_bos = part
    rng = np.random.default_rng(seed)
    renumbered_pieces, renumbered_sides, orders = [], [], []
    for vocabulary, segments in zip(pieces, sides, strict=True):
        order = [0, *(1 + rng.permutation(len(vocabulary) - 1)).tolist()]  # new id -> old id; bos keeps its own
        new_of = {old: new for new, old in enumerate(order)}
        renumbered_pieces.append([vocabulary[old] for old in order])
        renumbered_sides.append([[new_of[token] for token in segment] for segment in segments])
        orders.append(order)
    map_V = rng.integers(-1, len(pieces[1]), len(pieces[0])).astype(np.int32)
    old_to_new = {old: new for new, old in enumerate(orders[1])} | {-1: -1}
    new_map_V = np.array([old_to_new[int(map_V[old])] for old in orders[0]], np.int32)
    found = []
    for one, target_ids_V in ((part, map_V), ((tuple(renumbered_pieces), renumbered_sides, source_of, has_bos), new_map_V)):
        source, target, spellings, matches = warped(one)
        position_T = agreeing_positions(
            matches, source=source, target=target, spellings=spellings, match="fusechat", target_ids_V=target_ids_V
        )
        found.append((runs_of(matches), position_T.tolist()))
    assert found[0] == found[1]


def test_paired_prefixes_need_not_end_at_the_same_byte():
    """What `span` promises and `dtw` does not: here two readings of one text are matched with tokens that stand elsewhere."""
    pieces = ["<s>", "a", "aa", "aaa"], ["<s>", "a", "aa", "aaa"]
    source, target = [2, 1, 1], [1, 1, 2]  # aa a a and a a aa
    part = (pieces, [[source], [target]], [0], (False, False))
    sides = warped(part)
    position_T = agreeing_positions(sides[3], source=sides[0], target=sides[1], spellings=sides[2], match="em")
    ends = [np.cumsum([len(pieces[0][token]) for token in side_ids]).tolist() for side_ids in (source, target)]
    assert any(u >= 0 and ends[0][u] != ends[1][t] for t, u in enumerate(position_T.tolist()))


@pytest.mark.parametrize("swap", [False, True])
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=3))
def test_real_tokenizers_are_warped_as_by_the_textbook(byte_level_folder, sentencepiece_folder, texts, swap):
    folders = [byte_level_folder, sentencepiece_folder][:: -1 if swap else 1]
    source, target = (Tokenizer.from_model_folder(folder) for folder in folders)
    sides = []
    for tokenizer in (source, target):
        encoded = tokenizer.encode_segments(texts)
        bos_id = tokenizer.roles["bos"] if tokenizer.prepends_bos else None
        sides.append(Side(token_ids_T=encoded.token_ids_T, offsets=encoded.segment_offsets, bos_id=bos_id))
    spellings = Spellings.of_tokenizers(source, target=target)
    matches = warp(sides[0], target=sides[1], source_segment_of_S=np.arange(len(texts)), spellings=spellings)
    assert [one.bos_id is None for one in sides] == [not swap, swap], "one of the two begins with bos"
    tokens = []
    for tokenizer, one in zip((source, target), sides, strict=True):
        names = [tokenizer.backend.id_to_token(int(token)).replace(tokenizer.word_start, "") for token in one.token_ids_T]
        starts, ends = one.offsets[:-1] + (one.bos_id is not None), one.offsets[1:]
        tokens.append([(names[start:end], int(start)) for start, end in zip(starts, ends, strict=True)])
    expected = []
    for (source_text, start), (target_text, _) in zip(*tokens, strict=True):
        expected += [[]] * (sides[1].bos_id is not None)
        found = warping(source_text, target_text)[1] if source_text and target_text else [[] for _ in target_text]
        expected += [[start + place for place in sources] for sources in found]
    assert runs_of(matches) == expected


@quick
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4))))
def test_pairs_are_counted(pairs):
    table = count_pairs(np.array([a for a, _ in pairs], np.uint16), np.array([b for _, b in pairs], np.uint32))
    counted = {(a, b): pairs.count((a, b)) for a, b in pairs}
    assert [((a, b), count) for a, b, count in table.iter_rows()] == sorted(counted.items())
    assert all(before < after for before, after in pairwise(table.select("source_id", "target_id").rows()))
