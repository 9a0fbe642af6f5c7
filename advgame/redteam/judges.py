"""What a strategy asks of its judges: a rating from 1 to 10, whether a prompt is on topic, whether it is faithful."""

from __future__ import annotations

from collections import Counter
from typing import Protocol, cast

from advgame.game.judge import Judge, Key
from advgame.game.tree import Sample, Seed, attacker_rubric
from advgame.redteam.prompts import HIGHEST, LOWEST, fill, parse_rating, parse_topic
from advgame.redteam.records import Ledger, Voice
from advgame.rollout.engine import Sampling, end_of_stop


class AttackJudge(Protocol):
    """Guides the search; what counts as success in the end is the classifier's to say."""

    async def rate(self, seed: Seed, prompt: str, response: str, key: str) -> int | None:
        """How far the response serves the seed, 1 to 10; None when the judge could not be asked."""

    async def on_topic(self, seed: Seed, prompt: str, key: str) -> bool:
        """Whether a prompt asks for what the seed asks for; no readable verdict counts as yes."""

    async def faithful(self, seed: Seed, prompt: str, key: str) -> bool | None:
        """Whether a rewrite kept the seed's intent, in the game's own sense; None without a verdict."""


class ModelJudge:
    """A language model. A rating that cannot be read is 1, a topic verdict that cannot be read is yes; both counted."""

    def __init__(self, ledger: Ledger, rating: Voice, topic: Voice, game: Judge, counters: Counter[str]):
        """`game` is asked about faithfulness."""
        self._ledger, self._rating, self._topic, self._game, self._counters = ledger, rating, topic, game, counters

    async def rate(self, seed: Seed, prompt: str, response: str, key: str) -> int | None:
        text = fill("judge_rating", {"objective": seed.text, "prompt": prompt, "response": response})
        answer = await self._ledger.ask(self._rating, key, [("user", text)])
        if answer is None:
            return None
        rating = parse_rating(answer.text)
        self._counters["ratings_unparsable"] += rating is None
        return LOWEST if rating is None else rating

    async def on_topic(self, seed: Seed, prompt: str, key: str) -> bool:
        text = fill("judge_topic", {"objective": seed.text, "prompt": prompt})
        answer = await self._ledger.ask(self._topic, key, [("user", text)])
        verdict = None if answer is None else parse_topic(answer.text)
        self._counters["topics_unparsable"] += verdict is None
        return verdict is not False

    async def faithful(self, seed: Seed, prompt: str, key: str) -> bool | None:
        return await self._game.faithful(seed, prompt, key=ledger_key(key))


class GameJudge:
    """A judge of the game that needs no model: the tiny world's exact one, or the phrase judge of smoke tests.

    Its 0 to 10 for what the Attacker wants (compliance, or refusal of a benign seed), rounded, from 1 up.
    """

    def __init__(self, judge: Judge, counters: Counter[str]):
        self._judge, self._counters = judge, counters

    async def rate(self, seed: Seed, prompt: str, response: str, key: str) -> int | None:
        score = await self._judge.score(attacker_rubric(seed.category), seed.text, response, key=())
        self._counters["ratings_unparsable"] += score is None
        return LOWEST if score is None else min(HIGHEST, max(LOWEST, round(score)))

    async def on_topic(self, seed: Seed, prompt: str, key: str) -> bool:
        return await self._judge.faithful(seed, prompt, key=()) is not False

    async def faithful(self, seed: Seed, prompt: str, key: str) -> bool | None:
        return await self._judge.faithful(seed, prompt, key=())


class LedgerSpeaker:
    """`Asks` over a ledger, for judges and classifiers that speak by user turns: their queries go on the record.

    A failure raises Halt instead of coming back as an empty answer; a request that is refused for good comes back
    as one.
    """

    def __init__(self, ledger: Ledger, voice: Voice, counters: Counter[str], parts: str | None = None):
        """`parts`: what separates the turns (user, assistant, ...) within a text; None: every text is one turn."""
        self.ledger, self.voice, self.counters, self.parts = ledger, voice, counters, parts

    async def ask(
        self, user: str, key: Key, sampling: Sampling | None = None, stop: tuple[str, ...] = ()
    ) -> tuple[Sample | None, str]:
        texts = [user] if self.parts is None else user.split(self.parts)
        turns = [(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
        answer = await self.ledger.ask(self.voice, ".".join(map(str, key)), turns, sampling)
        if answer is None:
            return None, ""
        end = end_of_stop(answer.text, stop)  # the record keeps the whole answer
        reason = answer.finish_reason if end is None else "stop"
        return Sample((), (), (), reason, 0), answer.text[:end]


def ledger_key(key: str) -> Key:
    """A key of the ledger where a `Judge` takes numbers: they only ever extend it and name a query by it."""
    return cast(Key, (key,))
