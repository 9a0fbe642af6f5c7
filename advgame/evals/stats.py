"""Means with bootstrap intervals: micro (over rows) and macro (over groups, such as behaviours), seeded.

The interval is the percentile bootstrap: rows are drawn with replacement for micro means; for macro means whole groups
are, each keeping its rows, since rows of one group are not independent. Where all rows agree it has no width, which
says that the sample varies not at all, not that the rate is known exactly.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
_CHUNK = 1 << 20
"""Random indices drawn at once: memory stays flat in rows times resamples."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval. `n`: rows behind it; `groups`: groups behind a macro mean, None for a micro mean."""

    value: float
    low: float
    high: float
    n: int
    groups: int | None = None

    @property
    def form(self) -> str:
        return "micro" if self.groups is None else "macro"


def micro(
    values: Iterable[float], *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Estimate | None:
    """The mean over rows; None where there are none."""
    data = np.fromiter(values, dtype=np.float64)
    if not len(data):
        return None
    low, high = interval(bootstrap_means(data, seed=seed, resamples=resamples), level)
    return Estimate(float(data.mean()), low, high, len(data))


def macro(
    pairs: Iterable[tuple[Hashable, float]], *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Estimate | None:
    """The mean over groups of each group's mean, of (group, value) pairs; None where there are none."""
    sums: dict[Hashable, list[float]] = {}
    for group, value in pairs:
        entry = sums.setdefault(group, [0.0, 0.0])
        entry[0] += value
        entry[1] += 1
    if not sums:
        return None
    means = np.array([total / count for total, count in sums.values()])
    low, high = interval(bootstrap_means(means, seed=seed, resamples=resamples), level)
    return Estimate(float(means.mean()), low, high, int(sum(count for _, count in sums.values())), len(means))


def bootstrap_means(data: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """(resamples,) means of rows of `data` (rows,) drawn with replacement; depends on data and seed alone."""
    rows = len(data)
    means = np.empty(resamples)
    generator = np.random.Generator(np.random.Philox(seed))
    at_once = max(1, _CHUNK // rows)
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        means[start : start + count] = data[generator.integers(0, rows, (count, rows))].mean(1)
    return means


def interval(means: Sequence[float] | np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The percentile interval of bootstrap means."""
    low, high = np.quantile(np.asarray(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
