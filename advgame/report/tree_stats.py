"""What recorded trees say beyond the metrics: how the judge scores, and how new attacks are. One pass, flat memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from advgame.game.tree import Category, PairScore, Tree
from advgame.report.series import Curves, Series
from advgame.run import names

BUCKETS = 40
"""Correlations are drawn over at most this many spans of steps."""
FEWEST = 20
"""Comparisons that a span needs for its correlation to be drawn."""


@dataclass
class Comparisons:
    """Sums over comparisons of two answers: d is first score minus second, l first length minus second (characters)."""

    n: int = 0
    d: float = 0.0
    l: float = 0.0  # noqa: E741
    dd: float = 0.0
    ll: float = 0.0
    dl: float = 0.0
    ties: int = 0

    def add(self, difference: float, longer: float) -> None:
        self.n += 1
        self.d += difference
        self.l += longer
        self.dd += difference * difference
        self.ll += longer * longer
        self.dl += difference * longer
        self.ties += difference == 0

    def merge(self, other: Comparisons) -> None:
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def correlation(self) -> float | None:
        """Pearson's r of score difference and length difference; None where one of them never varies."""
        variances = (self.n * self.dd - self.d**2) * (self.n * self.ll - self.l**2)
        if self.n < 2 or variances <= 1e-12:
            return None
        return max(-1.0, min(1.0, (self.n * self.dl - self.d * self.l) / math.sqrt(variances)))

    def first_minus_second(self) -> tuple[float, float] | None:
        """Mean score difference and its standard error: 0 for a judge without a position bias."""
        if self.n < 2:
            return None
        average = self.d / self.n
        variance = max(0.0, self.dd / self.n - average**2) * self.n / (self.n - 1)
        return average, math.sqrt(variance / self.n)


Key = tuple[str, str]
"""(role whose judge it is, category)"""


@dataclass
class TreeStats:
    """Accumulates over trees in the order of recording."""

    comparisons: dict[Key, dict[int, Comparisons]] = field(default_factory=dict)
    scores: dict[Key, list[int]] = field(default_factory=dict)
    """Verdicts by rounded score, 0 to 10."""
    prompts: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    """By category and step: attacks with a prompt, different ones among them, ones never seen before in the run."""
    _seen: set[int] = field(default_factory=set)
    _of_step: tuple[int, set[int]] = field(default_factory=lambda: (-1, set()))

    def add(self, step: int, tree: Tree) -> None:
        """Counts one tree of a step; the trees of a step come one after another."""
        if self._of_step[0] != step:
            self._of_step = (step, set())
        category = str(tree.seed.category)
        for attack in tree.attacks:
            answers = [response.answer for response in attack.responses]
            self._judged("defender", category, step, attack.verdicts, answers)
            if attack.prompt is not None and not attack.direct:
                self._prompt(category, step, hash(attack.prompt))
        chosen = [
            None if index is None else attack.responses[index].answer
            for attack, index in zip(tree.attacks, tree.representatives, strict=False)
        ]
        self._judged("attacker", category, step, tree.verdicts, chosen)

    def _prompt(self, category: str, step: int, text: int) -> None:
        counts = self.prompts.setdefault(category, {}).setdefault(step, [0, 0, 0])
        counts[0] += 1
        counts[1] += text not in self._of_step[1]
        counts[2] += text not in self._seen
        self._of_step[1].add(text)
        self._seen.add(text)

    def _judged(
        self, role: str, category: str, step: int, verdicts: Sequence[PairScore], answers: Sequence[str | None]
    ) -> None:
        if not verdicts:
            return
        histogram = self.scores.setdefault((role, category), [0] * 11)
        for verdict in verdicts:
            if verdict.scores is not None:
                for score in verdict.scores[: 1 if verdict.first == verdict.second else 2]:
                    histogram[max(0, min(10, round(score)))] += 1
        for i, j, a, b in compared(verdicts):
            first, second = answers[i], answers[j]
            if first is not None and second is not None:
                by_step = self.comparisons.setdefault((role, category), {})
                by_step.setdefault(step, Comparisons()).add(a - b, len(first) - len(second))

    def total(self, key: Key) -> Comparisons:
        """All comparisons of a run."""
        whole = Comparisons()
        for one in self.comparisons.get(key, {}).values():
            whole.merge(one)
        return whole

    def curves(self) -> Curves:
        """Curves under `judge/<role>/<category>/...` and `<category>/attacker/...`."""
        found: Curves = {}
        for (role, category), by_step in self.comparisons.items():
            for what, series in _judge_curves(by_step).items():
                found[f"judge/{role}/{category}/{what}"] = series
        for category, counts in self.prompts.items():
            steps = sorted(counts)
            for place, what in ((1, "unique_prompts"), (2, "new_prompts")):
                values = [counts[step][place] / counts[step][0] for step in steps]
                found[f"{category}/attacker/{what}"] = Series(steps, values)
        return found

    def table(self) -> list[dict[str, Any]]:
        """One row a judge and category, for the page."""
        rows = []
        for role in names.ROLES:
            for category in map(str, Category):
                if (role, category) not in self.scores:
                    continue
                whole = self.total((role, category))
                position = whole.first_minus_second()
                rows.append(
                    {
                        "role": role,
                        "category": category,
                        "n": whole.n,
                        "length_correlation": whole.correlation(),
                        "first_minus_second": position and position[0],
                        "standard_error": position and position[1],
                        "ties": whole.ties / whole.n if whole.n else None,
                        "scores": self.scores[role, category],
                    }
                )
        return rows


def compared(verdicts: Sequence[PairScore]) -> Iterator[tuple[int, int, float, float]]:
    """(first, second, score, score) of two different answers; a point-wise judge's scores are paired up."""
    alone: dict[int, float] = {}
    for verdict in verdicts:
        if verdict.scores is None or not all(map(math.isfinite, verdict.scores)):
            continue
        if verdict.first != verdict.second:
            yield verdict.first, verdict.second, *verdict.scores
        else:
            alone[verdict.first] = verdict.scores[0]
    for i, j in combinations(sorted(alone), 2):
        yield i, j, alone[i], alone[j]


def _judge_curves(by_step: dict[int, Comparisons]) -> Curves:
    steps = sorted(by_step)
    size = math.ceil(len(steps) / BUCKETS)
    found = {what: Series([], []) for what in ("length_correlation", "first_minus_second", "ties")}
    for start in range(0, len(steps), size):
        span = steps[start : start + size]
        whole = Comparisons()
        for step in span:
            whole.merge(by_step[step])
        if whole.n < FEWEST:
            continue
        position = whole.first_minus_second()
        values = {
            "length_correlation": whole.correlation(),
            "first_minus_second": position and position[0],
            "ties": whole.ties / whole.n,
        }
        for what, value in values.items():
            if value is not None:
                found[what].steps.append(span[len(span) // 2])
                found[what].values.append(value)
    return {what: series for what, series in found.items() if series.steps}
