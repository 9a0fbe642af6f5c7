"""Answers compared in both orders: AlpacaEval's win rates, with and without control for length, and Arena-Hard's score.

Win rate: a question's preference is the mean over both orders of 1 (the model's answer wins), 1/2 (tie), 0; the rate is
the mean over questions. An order without a verdict is left out; a question without any is counted as unparsed.

Length-controlled win rate, after the idea of AlpacaEval 2 (Dubois et al., arXiv 2404.04475): a logistic regression of
the preference p on the difference in length,

    p ~ sigmoid(a + b tanh(d / s) [+ c g]),     d = characters of the model's answer - the baseline's,

with s the standard deviation of d over questions and g the question's difficulty (column `instruction_difficulty`,
where the file has it), fitted by Newton's method with soft labels on the mean log-loss and an L2 penalty of 0.001 / 2
on b and c; then the rate is the mean of sigmoid(a + c g): what the model would get with answers of the baseline's
length. It is not the official number: that one adds two published "gamed" baselines to the fit, and uses an L1 penalty
chosen by cross-validation.

Arena-Hard: two games a question (the baseline first, then the model first); a game gives 1, 1/2 or 0 once, and three
times for a far better side (`>>`); the score is the mean over all of them, with the 5 % and 95 % quantiles of 100
bootstrap means. A question with a game missing is left out, as upstream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from advgame.errors import InputError
from advgame.evals.row import EvalRow, optional, rows_of, text_of
from advgame.evals.stats import Estimate, interval, micro
from advgame.game.rows import Row

Game = int
"""From the model's side: 2 far better, 1 better, 0 tie, -1 worse, -2 far worse."""

STRONG = 3
"""How often a far better side counts in Arena-Hard's score."""


@dataclass(frozen=True)
class Question:
    """One question with the baseline's answer; `difficulty` is NaN where the file does not tell it."""

    row: EvalRow
    baseline: str
    difficulty: float = float("nan")


def load_alpaca(path: Path) -> Iterator[Question]:
    """JSON list of `instruction, output, generator` (the baseline's answers); ids are item numbers."""
    for row in rows_of(path):
        prompt, output = text_of(row, "instruction"), text_of(row, "output", empty=True)
        tags = {"dataset": optional(row, "dataset")} if optional(row, "dataset") else {}
        difficulty = row.fields.get("instruction_difficulty")
        known = isinstance(difficulty, int | float)
        yield Question(
            EvalRow(str(row.number), prompt, prompt, "comply", tags=tags), output,
            float(difficulty) if known else float("nan"),  # type: ignore[arg-type]
        )  # fmt: skip


def load_arena(path: Path, baseline: Path | None) -> Iterator[Question]:
    """JSONL `uid, category, prompt`, and the baseline's answers: JSONL `uid` with `output` or `messages`."""
    if baseline is None:
        raise InputError(f"{path}: arena-hard needs `baseline:`, a JSONL of uid and output")
    answers = {text_of(row, "uid"): _answer(row) for row in rows_of(baseline)}
    for row in rows_of(path):
        name, prompt = text_of(row, "uid"), text_of(row, "prompt")
        if name not in answers:
            raise InputError(f"{row.where}: {baseline} has no answer to {name!r}; give the baseline's whole file")
        tags = {"category": optional(row, "category")} if optional(row, "category") else {}
        yield Question(EvalRow(name, prompt, prompt, "comply", tags=tags), answers[name])


def _answer(row: Row) -> str:
    messages = row.fields.get("messages")
    if "output" in row.fields or not isinstance(messages, list) or not messages:
        return text_of(row, "output", empty=True)
    content: Any = messages[-1].get("content") if isinstance(messages[-1], dict) else None
    content = content.get("answer") if isinstance(content, dict) else content
    if not isinstance(content, str):
        raise InputError(f"{row.where}: the last message has no text; write `output`")
    return content


@dataclass(frozen=True)
class Compared:
    """One question's games, in the order (baseline first, model first); None: no verdict. Lengths in characters."""

    games: tuple[Game | None, Game | None]
    length: int
    baseline_length: int
    difficulty: float = float("nan")

    @property
    def preference(self) -> float | None:
        given = [(np.sign(game) + 1) / 2 for game in self.games if game is not None]
        return float(np.mean(given)) if given else None

    @property
    def swapped(self) -> bool | None:
        """Whether the two orders name different winners (a tie is an outcome of its own); None: an order is missing."""
        first, second = self.games
        return None if first is None or second is None else bool(np.sign(first) != np.sign(second))


def win_rate(compared: Sequence[Compared], seed: int = 0) -> Estimate | None:
    """See the module's text."""
    return micro([p for one in compared if (p := one.preference) is not None], seed=seed)


def length_controlled(compared: Sequence[Compared], seed: int = 0, resamples: int = 200) -> Estimate | None:
    """See the module's text; the interval is a bootstrap over questions, refitted each time."""
    kept = [(one, p) for one in compared if (p := one.preference) is not None]
    if not kept:
        return None
    target = np.array([p for _, p in kept])
    lengths = np.array([one.length - one.baseline_length for one, _ in kept], dtype=float)
    difficulty = np.array([one.difficulty for one, _ in kept])
    rate = _controlled(target, lengths, difficulty)
    generator = np.random.Generator(np.random.Philox(seed))
    draws = [generator.integers(0, len(target), len(target)) for _ in range(resamples)]
    low, high = interval([_controlled(target[i], lengths[i], difficulty[i]) for i in draws])
    return Estimate(rate, low, high, len(kept))


def _controlled(target: np.ndarray, lengths: np.ndarray, difficulty: np.ndarray) -> float:
    spread = lengths.std()
    columns = [np.ones_like(target), np.tanh(lengths / spread) if spread > 0 else np.zeros_like(target)]
    if not np.isnan(difficulty).any():
        columns.append(difficulty)
    design = np.stack(columns, 1)
    weights = fit_logistic(design, target)
    design[:, 1] = 0.0
    return float(_sigmoid(design @ weights).mean())


def fit_logistic(design: np.ndarray, target: np.ndarray, penalty: float = 0.001, steps: int = 50) -> np.ndarray:
    """Weights (features,) of a logistic regression with soft targets in [0, 1] on `design` (rows, features).

    Newton's method on the mean log-loss plus `penalty` / 2 times the squared weights, the first (the constant) aside,
    which has 1e-6 so that targets that are all equal keep it finite.
    """
    ridge = np.full(design.shape[1], penalty)
    ridge[0] = 1e-6
    weights = np.zeros(design.shape[1])
    for _ in range(steps):
        probability = _sigmoid(design @ weights)
        gradient = design.T @ (probability - target) / len(target) + ridge * weights
        curvature = (design.T * (probability * (1 - probability))) @ design / len(target) + np.diag(ridge)
        step = np.linalg.solve(curvature, gradient)
        # a full Newton step may overshoot where the targets are all but separable
        weights = weights - step * min(1.0, 2.0 / max(1e-12, float(np.abs(step).max())))
        if np.abs(step).max() < 1e-9:
            break
    return weights


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-np.clip(x, -500, 500)))


def arena_score(compared: Sequence[Compared], seed: int = 0, resamples: int = 100) -> Estimate | None:
    """See the module's text; `n` counts questions."""
    battles: list[float] = []
    questions = 0
    for one in compared:
        if None in one.games:
            continue
        questions += 1
        for game in one.games:
            assert game is not None
            battles += [(np.sign(game) + 1) / 2] * (STRONG if abs(game) == 2 else 1)
    rate = micro(battles, seed=seed, resamples=resamples, level=0.90)
    return None if rate is None else replace(rate, n=questions)


Order = Literal["A>>B", "A>B", "A=B", "B>A", "B>>A"]
GAMES: dict[str, Game] = {
    "A>>B": 2, "A>B": 1, "A=B": 0, "B=A": 0, "A<B": -1, "B>A": -1, "A<<B": -2, "B>>A": -2, "B<A": 1, "B<<A": 2,
}  # fmt: skip
"""A verdict from the side of A."""
