"""A language model as the judge: asks it in the words of the templates and reads its verdicts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from advgame.game.judge import Key
from advgame.game.parsing import parse_score, parse_scores, parse_verdict
from advgame.game.prompts import Templates
from advgame.game.tree import Rubric, Seed
from advgame.rollout.speaker import Asks

T = TypeVar("T")

CLOSING_TAGS: Mapping[Callable[[str], Any], str] = {
    parse_verdict: "</verdict>",
    parse_scores: "</score_B>",
    parse_score: "</score>",
}
"""What ends the verdict that each of these reads."""


class LLMJudge:
    """A `Judge` that asks `speaker`, `samples` times for each judgement (at once, each with its own key).

    A completion that the engine could not make, that ran into its token limit or that holds no verdict is
    left out, and counted in `speaker.counters["judge_no_verdict"]`. Of the others:

    - faithfulness is their strict majority; ties are false, and no verdict at all is None;
    - scores are their mean; no verdict at all is None.

    With `swap` each sample of a comparison is asked in both orders, its scores are swapped back and averaged;
    if one order alone gave a verdict, that one is used. `judge_swaps` counts the samples where both did and
    the answers differ, `judge_swap_disagreements` those among them where the orders do not name the same
    winner (a tie is an outcome of its own). `speaker` brings the sampling settings.

    With `stop` a completion ends behind its verdict's closing tag, and its first verdict counts; without it, the last.

    Raises:
        ValueError: `samples` is less than 1.
    """

    def __init__(
        self, speaker: Asks, templates: Templates, samples: int = 1, swap: bool = False, stop: bool = False
    ) -> None:
        if samples < 1:
            raise ValueError(f"a judge needs at least 1 sample, not {samples}")
        self.speaker = speaker
        self.templates = templates
        self.samples = samples
        self.swap = swap
        self.stop = stop

    async def faithful(self, seed: Seed, prompt: str, *, key: Key) -> bool | None:
        """Does `prompt` keep the intent of `seed`?"""
        text = self.templates.faithful(seed, prompt)
        verdicts = _given(await self._samples(lambda s: self._verdict(text, parse_verdict, (*key, s))))
        return 2 * sum(verdicts) > len(verdicts) if verdicts else None

    async def compare(self, rubric: Rubric, query: str, a: str, b: str, *, key: Key) -> tuple[float, float] | None:
        """Scores (0 to 10) of two answers to one query, seen side by side."""

        async def one(sample: int) -> tuple[float, float] | None:
            # The order is part of the key even without swapping, so that switching it on leaves the first
            # order's random stream as it was.
            orders = [self._verdict(self.templates.pair(rubric, query, a, b), parse_scores, (*key, sample, 0))]
            if self.swap:
                orders.append(self._verdict(self.templates.pair(rubric, query, b, a), parse_scores, (*key, sample, 1)))
            verdicts = await asyncio.gather(*orders)
            return self._swapped_back(verdicts, distinct=a != b)

        scores = _given(await self._samples(one))
        return (_mean([s[0] for s in scores]), _mean([s[1] for s in scores])) if scores else None

    async def score(self, rubric: Rubric, query: str, answer: str, *, key: Key) -> float | None:
        """The score (0 to 10) of one answer seen alone."""
        text = self.templates.point(rubric, query, answer)
        scores = _given(await self._samples(lambda s: self._verdict(text, parse_score, (*key, s))))
        return _mean(scores) if scores else None

    async def _verdict(self, text: str, parse: Callable[[str], T | None], key: Key) -> T | None:
        stop = (CLOSING_TAGS[parse],) if self.stop else ()
        sample, completion = await self.speaker.ask(text, key, stop=stop)
        # A verdict in a truncated completion may be one that the judge was still arguing with.
        verdict = parse(completion) if sample is not None and sample.finished else None
        if verdict is None:
            self.speaker.counters["judge_no_verdict"] += 1
        return verdict

    async def _samples(self, one: Callable[[int], Coroutine[Any, Any, T]]) -> list[T]:
        return await asyncio.gather(*(one(sample) for sample in range(self.samples)))

    def _swapped_back(
        self, verdicts: Sequence[tuple[float, float] | None], *, distinct: bool
    ) -> tuple[float, float] | None:
        orders = [v if order == 0 or v is None else (v[1], v[0]) for order, v in enumerate(verdicts)]
        given = _given(orders)
        if not given:
            return None
        if len(given) == 2 and distinct:
            self.speaker.counters["judge_swaps"] += 1
            winners = {(a > b) - (a < b) for a, b in given}
            self.speaker.counters["judge_swap_disagreements"] += len(winners) - 1
        return _mean([s[0] for s in given]), _mean([s[1] for s in given])


def _given(verdicts: Sequence[T | None]) -> list[T]:
    return [verdict for verdict in verdicts if verdict is not None]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
