"""What the game asks of a judge, and how verdicts over candidates are arranged."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import combinations
from typing import Protocol

from advgame.game.tree import PairScore, Rubric, Seed

Key = tuple[int, ...]
"""Names one call within a run (step, tree, role, ...); every random stream is derived from it."""


class Judge(Protocol):
    """Scores answers and checks faithfulness. `None` always means "no verdict", never a score."""

    async def faithful(self, seed: Seed, prompt: str, *, key: Key) -> bool | None:
        """Does `prompt` keep the intent of `seed`?"""

    async def compare(self, rubric: Rubric, query: str, a: str, b: str, *, key: Key) -> tuple[float, float] | None:
        """Scores (0 to 10) of two answers to one query, seen side by side."""

    async def score(self, rubric: Rubric, query: str, answer: str, *, key: Key) -> float | None:
        """The score (0 to 10) of one answer seen alone."""


async def judge_candidates(
    judge: Judge, rubric: Rubric, query: str, candidates: Sequence[tuple[int, str]], *, pairwise: bool, key: Key
) -> tuple[PairScore, ...]:
    """Verdicts over `candidates` (index, answer): every pair, or each alone if `pairwise` is off.

    A lone candidate of a pairwise judge is compared with itself, so that its reward exists.
    """
    if not pairwise:
        scores = await asyncio.gather(
            *(judge.score(rubric, query, answer, key=(*key, i, i)) for i, answer in candidates)
        )
        return tuple(
            PairScore(i, i, None if score is None else (score, score))
            for (i, _), score in zip(candidates, scores, strict=True)
        )
    couples = list(combinations(candidates, 2)) or [(c, c) for c in candidates]
    verdicts = await asyncio.gather(
        *(judge.compare(rubric, query, a, b, key=(*key, i, j)) for (i, a), (j, b) in couples)
    )
    return tuple(PairScore(i, j, scores) for ((i, _), (j, _)), scores in zip(couples, verdicts, strict=True))
