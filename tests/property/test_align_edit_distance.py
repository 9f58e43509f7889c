"""Edit distances against the textbook's programme."""

import numpy as np
from fuseline.align.edit_distance import distances, nearest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.textbook import edit_distance

quick = settings(max_examples=200, deadline=None)
few_chars = st.text(alphabet="ab▁", max_size=6)
any_chars = st.text(alphabet=st.characters() | st.sampled_from("\udc80\udcff"), max_size=12)
repeated = st.builds(
    lambda text, times: text * times, st.text(alphabet="abc", max_size=5), st.integers(0, 40)
)  # longer than a word of 64 bits


@quick
@given(st.lists(st.tuples(few_chars | any_chars | repeated, few_chars | any_chars | repeated), max_size=8))
@example([("x" * 64, "x" * 65), ("x" * 63 + "y", "y" + "x" * 63), ("x" * 65, ""), ("", "")])
def test_distances_are_those_of_the_textbook(pairs):
    left, right = [a for a, _ in pairs], [b for _, b in pairs]
    assert distances(left, right).tolist() == [edit_distance(a, b) for a, b in pairs]


@quick
@given(queries=st.lists(few_chars | any_chars, max_size=6), candidates=st.lists(few_chars | any_chars, max_size=12))
def test_the_nearest_is_the_first_of_those_at_the_smallest_distance(queries, candidates):
    index_N, distance_N = nearest(queries, candidates=candidates)
    for query, index, distance in zip(queries, index_N.tolist(), distance_N.tolist(), strict=True):
        expected = [edit_distance(query, candidate) for candidate in candidates]
        if candidates:
            assert (index, distance) == (expected.index(min(expected)), min(expected))
        else:
            assert index == -1


@quick
@given(queries=st.lists(few_chars, min_size=1, max_size=5), candidates=st.lists(few_chars, min_size=1, max_size=9), seed=st.integers(0, 99))
def test_the_order_of_the_candidates_changes_no_distance(queries, candidates, seed):
    order = np.random.default_rng(seed).permutation(len(candidates))
    _, before_N = nearest(queries, candidates=candidates)
    index_N, after_N = nearest(queries, candidates=[candidates[place] for place in order])
    assert before_N.tolist() == after_N.tolist()
    found = [candidates[order[index]] for index in index_N]
    assert [edit_distance(query, text) for query, text in zip(queries, found, strict=True)] == before_N.tolist()


def test_many_queries_are_each_given_their_own():
    """More than one thread has at a time."""
    rng = np.random.default_rng(3)
    words = ["".join(rng.choice(list("abcdefgh"), int(rng.integers(1, 9)))) for _ in range(3000)]
    candidates = words[:300]
    index_N, distance_N = nearest(words, candidates=candidates)
    for n in range(0, 3000, 97):
        expected = [edit_distance(words[n], candidate) for candidate in candidates]
        assert (index_N[n], distance_N[n]) == (expected.index(min(expected)), min(expected))
