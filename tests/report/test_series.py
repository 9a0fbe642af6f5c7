"""Curves from rows: nulls left out, counters as growth, thinning keeps means."""

import pytest

from advgame.report.series import SWAP_DISAGREEMENT, Series, curves_of, ends, growth, thin


def test_nulls_and_own_keys_are_left_out():
    curves = curves_of([{"step": 0, "attempt": 0, "time": 1.0, "a": 1.0}, {"step": 2, "a": None}, {"step": 3, "a": 4}])
    assert curves == {"a": Series([0, 3], [1.0, 4.0])}


def test_a_counter_that_starts_again_is_never_negative():
    assert growth(Series([0, 1, 2, 3], [2, 5, 1, 4])).values == [2, 3, 0, 3]


def test_swap_disagreement_by_row():
    counts = [(10, None), (10, None), (30, 5), (40, 15)]
    rows = [
        {"step": i, "count/judge_swaps": swaps} | ({} if bad is None else {"count/judge_swap_disagreements": bad})
        for i, (swaps, bad) in enumerate(counts)
    ]
    # nothing was swapped in the second row; the disagreements appear with the first one
    assert curves_of(rows)[SWAP_DISAGREEMENT] == Series([0, 2, 3], [0.0, 0.25, 1.0])


def test_thinning():
    series = Series(list(range(1000)), [float(i % 10) for i in range(1000)])
    assert thin(series, 1000) is series
    short = thin(series, 100)
    assert len(short.steps) == 100
    assert short.values == pytest.approx([4.5] * 100)
    assert short.steps[:2] == [5, 15]
    assert len(thin(Series([1, 2, 3], [1, 2, 3]), 2).steps) == 2


def test_ends():
    assert ends(Series(list(range(20)), [*range(20)])) == (0.5, 18.5)
    assert ends(Series([7], [3.0])) == (3.0, 3.0)
