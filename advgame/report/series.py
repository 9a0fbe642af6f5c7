"""Curves as plain data: one metric over the steps, thinned to what a page can draw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from advgame.run import names

POINTS = 1500
"""Most points of a curve; longer ones are averaged over equal numbers of points."""

_NOT_METRICS = ("step", "attempt", "time")
_SWAPS = f"{names.COUNTER_PREFIX}judge_swaps"
_DISAGREEMENTS = f"{names.COUNTER_PREFIX}judge_swap_disagreements"

SWAP_DISAGREEMENT = "judge/swap_disagreement"
"""Share of the pairs asked in both orders, since the row before, in which the orders named different winners."""
ERRORS_PREFIX = "errors/"
"""A counter's growth from one row to the next."""


class Series(NamedTuple):
    """Values at steps, in order of recording; no nulls, nothing infinite."""

    steps: list[int]
    values: list[float]


Curves = dict[str, Series]


def curves_of(rows: Iterable[Mapping[str, Any]]) -> Curves:
    """Every metric of a run's rows, and the two derived ones above; null values are left out."""
    found: Curves = {}
    for row in rows:
        for key, value in row.items():
            if key not in _NOT_METRICS and isinstance(value, int | float) and math.isfinite(value):
                series = found.setdefault(key, Series([], []))
                series.steps.append(int(row["step"]))
                series.values.append(float(value))
    counters = {key: series for key, series in found.items() if key.startswith(names.COUNTER_PREFIX)}
    for key, series in counters.items():
        found[ERRORS_PREFIX + key.removeprefix(names.COUNTER_PREFIX)] = growth(series)
    if _SWAPS in counters:
        found[SWAP_DISAGREEMENT] = _ratio_of_growth(counters.get(_DISAGREEMENTS, Series([], [])), counters[_SWAPS])
    return found


def growth(series: Series) -> Series:
    """What a cumulative count grew by since the point before; the first point's is its own value.

    A counter appears with its first event, and starts again below its last value after a crash: never negative.
    """
    before = [0.0, *series.values]
    return Series(list(series.steps), [max(0.0, now - then) for then, now in zip(before, series.values, strict=False)])


def _ratio_of_growth(part: Series, whole: Series) -> Series:
    events = dict(zip(part.steps, growth(part).values, strict=True))
    grown = growth(whole)
    points = [(step, events.get(step, 0.0) / n) for step, n in zip(grown.steps, grown.values, strict=True) if n > 0]
    return Series([step for step, _ in points], [value for _, value in points])


def thin(series: Series, limit: int = POINTS) -> Series:
    """At most `limit` points: means over equally many neighbours (the last group may be smaller)."""
    size = math.ceil(len(series.steps) / limit)
    if size <= 1:
        return series
    groups = range(0, len(series.steps), size)
    return Series(
        [series.steps[i : i + size][len(series.steps[i : i + size]) // 2] for i in groups],
        [mean(series.values[i : i + size]) for i in groups],
    )


def packed(series: Series) -> list[list[float]]:
    """`[steps, values]` with five significant digits, which no chart can tell from more."""
    return [list(series.steps), [float(f"{value:.5g}") for value in series.values]]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def between(series: Series, low: float, high: float) -> list[float]:
    """The values at steps in [low, high]."""
    return [value for step, value in zip(*series, strict=True) if low <= step <= high]


def ends(series: Series, share: float = 0.1) -> tuple[float, float]:
    """Means of the first and the last `share` of the points (one point at least)."""
    count = max(1, round(len(series.values) * share))
    return mean(series.values[:count]), mean(series.values[-count:])
