"""Means and their bootstrap intervals, by hand and by known properties."""

import numpy as np

from advgame.evals.stats import bootstrap_means, macro, micro


def test_micro_and_macro_differ_as_they_must():
    pairs = [("a", 1.0), ("a", 1.0), ("a", 0.0), ("b", 0.0)]
    assert micro(v for _, v in pairs).value == 0.5
    found = macro(pairs)
    assert found.value == (2 / 3 + 0) / 2
    assert (found.n, found.groups, found.form) == (4, 2, "macro")
    assert micro([]) is None
    assert macro([]) is None


def test_intervals_are_seeded_and_hold_the_mean():
    data = [1.0] * 30 + [0.0] * 70
    one, again, other = micro(data, seed=1), micro(data, seed=1), micro(data, seed=2)
    assert one == again
    assert (one.low, one.high) != (other.low, other.high)
    assert one.low < 0.3 < one.high
    # 1.96 standard errors of a share of 0.3 in 100: 0.09
    assert abs((one.high - one.low) / 2 - 0.09) < 0.02


def test_the_bootstrap_is_that_of_plain_numpy():
    data = np.arange(7.0)
    generator = np.random.Generator(np.random.Philox(5))
    expected = data[generator.integers(0, 7, (50, 7))].mean(1)
    np.testing.assert_array_equal(bootstrap_means(data, seed=5, resamples=50), expected)


def test_macro_intervals_resample_groups():
    """Two behaviours of many equal rows: resampling rows would hide that there are only two."""
    pairs = [("a", 1.0)] * 500 + [("b", 0.0)] * 500
    found = macro(pairs)
    assert (found.low, found.high) == (0.0, 1.0)
