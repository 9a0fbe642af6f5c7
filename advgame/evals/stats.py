"""Means with bootstrap intervals: micro (over rows) and macro (over groups, such as behaviours), seeded.

The interval is the percentile bootstrap: rows are drawn with replacement for micro means; for macro means whole groups
are, each keeping its rows, since rows of one group are not independent. Where all rows agree it has no width, which
says that the sample varies not at all, not that the rate is known exactly.

Among n rows drawn with replacement each distinct value occurs as often as a multinomial of its share says. Resamples
are drawn in that way, from counts: memory and time depend on the number of distinct values (two for labels), not on
the number of rows, and the order of rows changes nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
_CHUNK = 1 << 16
"""Counts drawn at once: memory stays flat in distinct values times resamples."""


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
    values: Iterable[float] | Mapping[float, int],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Estimate | None:
    """The mean over rows, given as values or as how often each value occurs; None where there are none."""
    counts = values if isinstance(values, Mapping) else Counter(values)
    rows = sum(counts.values())
    if not rows:
        return None
    low, high = interval(bootstrap_means(counts, seed=seed, resamples=resamples), level)
    return Estimate(_mean(counts), low, high, rows)


class Groups:
    """Values by group as they come: a sum and a count a group, whatever the number of rows."""

    def __init__(self) -> None:
        self._sums: dict[Hashable, tuple[float, int]] = {}

    def add(self, group: Hashable, value: float) -> None:
        total, count = self._sums.get(group, (0.0, 0))
        self._sums[group] = total + value, count + 1

    def macro(self, *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL) -> Estimate | None:
        """The mean over groups of each group's mean; None where there are none."""
        if not self._sums:
            return None
        means = Counter(total / count for total, count in self._sums.values())
        low, high = interval(bootstrap_means(means, seed=seed, resamples=resamples), level)
        return Estimate(_mean(means), low, high, sum(count for _, count in self._sums.values()), len(self._sums))


def macro(
    pairs: Iterable[tuple[Hashable, float]], *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Estimate | None:
    """The mean over groups of each group's mean, of (group, value) pairs; None where there are none."""
    groups = Groups()
    for group, value in pairs:
        groups.add(group, value)
    return groups.macro(seed=seed, resamples=resamples, level=level)


def _mean(counts: Mapping[float, int]) -> float:
    """The same in any order: the sum is rounded once."""
    return math.fsum(value * count for value, count in counts.items()) / sum(counts.values())


def bootstrap_means(counts: Mapping[float, int], *, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """(resamples,) means of as many rows as `counts` has, drawn with replacement; depends on counts and seed alone.

    `counts`: how often each value occurs, at least once in all.
    """
    values = np.array(sorted(value for value, count in counts.items() if count), dtype=np.float64)
    often = np.array([counts[value] for value in values.tolist()], dtype=np.int64)
    rows = int(often.sum())
    means = np.empty(resamples)
    generator = np.random.Generator(np.random.Philox(seed))
    at_once = max(1, _CHUNK // len(values))
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        means[start : start + size] = generator.multinomial(rows, often / rows, size) @ values / rows
    return means


def interval(means: Sequence[float] | np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The percentile interval of bootstrap means."""
    low, high = np.quantile(np.asarray(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
