"""Means and their bootstrap intervals, by hand and by known properties."""

import math
import random
from collections import Counter
from itertools import product

import pytest

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
    one, again = micro(data, seed=1), micro(data, seed=1)
    assert one == again
    graded = [i**0.5 for i in range(50)]
    assert micro(graded, seed=1).low != micro(graded, seed=2).low
    assert one.low < 0.3 < one.high
    # 1.96 standard errors of a share of 0.3 in 100: 0.09
    assert abs((one.high - one.low) / 2 - 0.09) < 0.02


def test_the_bootstrap_is_that_of_rows_drawn_with_replacement():
    """Every one of the 4 ** 4 equally likely draws, enumerated, against what is drawn from counts."""
    rows = [0.0, 0.5, 0.5, 2.0]
    expected = Counter(sum(draw) / 4 for draw in product(rows, repeat=4))
    drawn = 200_000
    found = Counter(bootstrap_means(Counter(rows), seed=5, resamples=drawn).tolist())
    assert set(found) == set(expected)
    for mean, ways in expected.items():
        share = ways / 4**4
        assert abs(found[mean] / drawn - share) < 5 * math.sqrt(share * (1 - share) / drawn)


def test_rows_and_their_counts_give_one_figure_in_any_order():
    rows = [0.25, 1.0, 0.0, 1.0, 0.125] * 7
    shuffled = random.Random(1).sample(rows, len(rows))
    assert micro(rows) == micro(shuffled) == micro(Counter(rows))
    assert macro((i % 5, v) for i, v in enumerate(rows)).value == pytest.approx(sum(rows) / len(rows))


def test_macro_intervals_resample_groups():
    """Two behaviours of many equal rows: resampling rows would hide that there are only two."""
    pairs = [("a", 1.0)] * 500 + [("b", 0.0)] * 500
    found = macro(pairs)
    assert (found.low, found.high) == (0.0, 1.0)
