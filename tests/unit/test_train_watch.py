"""A figure is reported when it stands out from the steps before, and only then."""

import pytest
from fuseline.train.watch import WINDOW, Watch


def test_a_spike_is_reported_with_its_ratio():
    watch = Watch(5.0, before=[1.0, 2.0, 3.0] * 10)
    assert watch.ratio(11.0) == pytest.approx(5.5)
    assert watch.ratio(9.0) is None


def test_the_first_steps_are_never_spikes():
    watch = Watch(5.0)
    assert [watch.ratio(norm) for norm in (1000.0, *[1.0] * 9)] == [None] * 10


def test_it_goes_on_from_recorded_norms_as_if_it_had_seen_them():
    norms = [1.0 + (i * 7919 % 13) / 13 for i in range(3 * WINDOW)]
    norms[150] = norms[250] = 40.0
    whole = Watch(5.0)
    expected = [whole.ratio(norm) for norm in norms]
    resumed = Watch(5.0, before=norms[:200][-WINDOW:])
    assert [resumed.ratio(norm) for norm in norms[200:]] == expected[200:]
    assert sum(ratio is not None for ratio in expected) == 2
