"""One campaign: an attacker against a target over some seeds, from first query to last verdict."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from advgame.evals.classify import Classifier, Item
from advgame.game.tree import Seed
from advgame.redteam.budget import Budget, Halt, QueryFailed
from advgame.redteam.strategies import (
    Attempt,
    Candidate,
    Crew,
    SearchSettings,
    Stop,
    best_of_k,
    search,
    together,
)
from advgame.rollout.engine import EngineError

STRATEGIES = ("attacker", "pair", "tap", "attacker+pair", "attacker+tap")


@dataclass(frozen=True)
class Campaign:
    """What is done with each seed. `search` is None for best of k alone. The classifier has the last word on success
    and is no part of the attack: the search never sees its verdicts.
    """

    crew: Crew
    classifier: Classifier
    strategy: str
    k: int
    search: SearchSettings | None
    classify_all: bool
    in_flight: int


@dataclass
class Outcome:
    """All attempts in the order of the seeds. `failed`: how many are unfinished because a model gave no answer;
    `error`: what ended the run before its time, if a model is down.
    """

    attempts: list[Attempt]
    failed: int = 0
    error: EngineError | None = None

    def raise_failures(self) -> None:
        """EngineError, one line, unless every model answered."""
        if self.error is not None:
            raise self.error
        if self.failed:
            why = next(a.why for a in self.attempts if a.stop is Stop.UNFINISHED)
            raise EngineError(f"{self.failed} seeds are unfinished ({why}); run the same command again to go on")


async def run_campaign(
    campaign: Campaign, seeds: Sequence[Seed], budget: Budget, on_seed: Callable[[Attempt], None] = lambda _: None
) -> Outcome:
    """Works on `in_flight` seeds at a time. Never raises for a budget, a stop or a failure: those seeds stay
    unfinished, and what was answered is in the ledger. A model that is down stops new queries; those in flight end.
    """
    outcome = Outcome([Attempt(seed) for seed in seeds])
    places = asyncio.Semaphore(campaign.in_flight)

    async def one(attempt: Attempt) -> None:
        async with places:
            try:
                await _attack(campaign, attempt)
                await _classify(campaign, attempt)
            except Halt as halt:
                attempt.stop, attempt.why = Stop.UNFINISHED, str(halt)
                outcome.failed += isinstance(halt, QueryFailed)
            except EngineError as error:
                attempt.stop, attempt.why = Stop.UNFINISHED, str(error)
                outcome.error = outcome.error or error
                budget.stopping = True
        on_seed(attempt)

    async with asyncio.TaskGroup() as group:
        for attempt in outcome.attempts:
            group.create_task(one(attempt))
    return outcome


async def _attack(campaign: Campaign, attempt: Attempt) -> None:
    if campaign.search is None:
        await best_of_k(campaign.crew, attempt.seed, campaign.k, attempt)
    else:
        await search(campaign.crew, attempt.seed, campaign.search, attempt)


async def _classify(campaign: Campaign, attempt: Attempt) -> None:
    """Labels the submitted attack; or every answered one, which then also gets a verdict on its faithfulness."""
    best = attempt.best
    chosen = (
        [i for i, c in enumerate(attempt.candidates) if c.response is not None] if campaign.classify_all else [best]
    )

    def item(candidate: Candidate) -> Item:
        assert candidate.response is not None, "only answered attacks are classified"
        # the classifier sees what was to be reached, not how it was dressed
        return Item(attempt.seed.text, candidate.response, id=campaign.crew.key(attempt.seed, candidate.name))

    indices = [i for i in chosen if i is not None]
    verdicts = await together(campaign.classifier.classify([item(attempt.candidates[i])]) for i in indices)
    for i, (verdict,) in zip(indices, verdicts, strict=True):
        attempt.candidates[i] = replace(attempt.candidates[i], label=verdict.harmful)
    if campaign.classify_all:
        await _check_faithfulness(
            campaign.crew, attempt, [i for i in indices if attempt.candidates[i].faithful is None]
        )


async def _check_faithfulness(crew: Crew, attempt: Attempt, indices: Sequence[int]) -> None:
    verdicts = await together(
        crew.judge.faithful(attempt.seed, (c := attempt.candidates[i]).prompt, crew.key(attempt.seed, c.name))
        for i in indices
    )
    for i, verdict in zip(indices, verdicts, strict=True):
        attempt.candidates[i] = replace(attempt.candidates[i], faithful=verdict)
