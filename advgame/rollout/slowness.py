"""How much slower each of several replicas is than the others, learned from what they answer."""

from __future__ import annotations

import math

GAIN, LEAK = 0.05, 0.999
"""Of a completion: how far it moves its replica's weight, and what it leaves of every weight."""
KEEP = 0.95
"""Of the mean, at each completion: about the latest twenty count."""
FAR, MOST, NOISE = 2.0, math.log(32.0), 0.25
"""Logarithms: the farthest from the mean that a completion counts as, the largest weight, and how far equal replicas
come apart by chance: below that a weight is 1."""


class Slowness:
    """Weights of `count` replicas, 1 for the fastest; a request costs its replica's weight.

    A replica whose completions take longer for a token than the mean gets heavier as long as they do. Where a
    completion's time grows with its replica's load that ends when all take about the same, and the weights are about
    the ratios of their speeds; where it does not, they end where they leak as fast. What leaks is chance, and the
    memory of a replica that has recovered.
    """

    def __init__(self, count: int) -> None:
        self._logs = [0.0] * count
        self._mean: float | None = None

    def add(self, replica: int, seconds: float, tokens: int) -> None:
        """A completion of `tokens` that took `seconds` from its sending on."""
        took = math.log(max(seconds, 1e-6) / max(1, tokens))
        mean = took if self._mean is None else self._mean
        off = max(-FAR, min(FAR, took - mean))
        self._mean = mean + (1 - KEEP) * off
        self._logs[replica] += GAIN * off
        lowest = min(self._logs)
        self._logs = [min(MOST, LEAK * (value - lowest)) for value in self._logs]

    def forget(self, replica: int) -> None:
        """Another engine has taken this one's place."""
        self._logs[replica] = 0.0

    def weight(self, replica: int) -> float:
        return math.exp(max(0.0, self._logs[replica] - NOISE))
