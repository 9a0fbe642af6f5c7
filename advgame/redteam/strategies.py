"""The strategies: best of k samples, and one search loop that is TAP, and PAIR where it neither branches nor prunes.

Sources: PAIR, arXiv 2310.08419; TAP, arXiv 2312.02119, algorithm 1.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, TypeVar

from advgame.game.parsing import after_reasoning
from advgame.game.tree import Seed
from advgame.redteam.budget import Halt
from advgame.redteam.judges import AttackJudge
from advgame.redteam.prompts import HIGHEST
from advgame.redteam.records import Ledger, Voice
from advgame.redteam.targets import Answer
from advgame.redteam.writers import AttackWriter, Draft, Exchange

T = TypeVar("T")


@dataclass(frozen=True)
class SearchSettings:
    """One search. `depth` turns of at most `roots` (first) or `width` (later) conversations, each copied `branching`
    times; `keep_last` exchanges stay in a conversation; `retries` more tries for an attack that cannot be read.
    """

    roots: int
    branching: int
    width: int
    depth: int
    keep_last: int
    prune: bool
    retries: int = 5


def pair_settings(streams: int, turns: int, keep_last: int, retries: int = 5) -> SearchSettings:
    """PAIR: every stream lives on, nothing branches, nothing is pruned."""
    return SearchSettings(streams, 1, streams, turns, keep_last, prune=False, retries=retries)


def tap_settings(
    depth: int = 10, branching: int = 4, width: int = 10, roots: int = 1, keep_last: int = 3, retries: int = 5
) -> SearchSettings:
    return SearchSettings(roots, branching, width, depth, keep_last, prune=True, retries=retries)


class Stop(StrEnum):
    """Why the work on a seed ended; UNFINISHED can be continued."""

    TOP_RATING = "rated 10"
    EXHAUSTED = "all turns taken"
    SEED_BUDGET = "the seed's queries are spent"
    UNFINISHED = "unfinished"


class Fate(StrEnum):
    """What became of one attack, in the order in which it is decided."""

    UNREADABLE = "unreadable"
    OFF_TOPIC = "off topic"
    UNFAITHFUL = "unfaithful"
    NO_FAITHFULNESS_VERDICT = "no faithfulness verdict"
    NOT_ASKED = "not asked"
    REJECTED = "rejected"
    UNJUDGED = "unjudged"
    JUDGED = "judged"


@dataclass(frozen=True)
class Candidate:
    """One attack and what it led to. `rank` is its place among the target queries of its seed, from 1; 0: not asked.

    `faithful` is the judge's verdict on the rewrite (on being on topic, in TAP), None without one; `label` the
    classifier's: True a success, None not classified or no verdict.
    """

    name: str
    parent: str
    fate: Fate
    prompt: str = ""
    improvement: str = ""
    response: str | None = None
    rating: int | None = None
    rank: int = 0
    prompt_tokens: int | None = None
    response_tokens: int | None = None
    faithful: bool | None = None
    label: bool | None = None


@dataclass
class Attempt:
    """All attacks on one seed so far, in order; grows while a strategy works, so that a stop loses nothing."""

    seed: Seed
    candidates: list[Candidate] = field(default_factory=list)
    stop: Stop = Stop.UNFINISHED
    why: str = ""

    @property
    def queries(self) -> int:
        return max((candidate.rank for candidate in self.candidates), default=0)

    @property
    def best(self) -> int | None:
        """Index of the highest rated candidate, the earliest of equals; answered but unjudged ones come last."""
        answered = [i for i, c in enumerate(self.candidates) if c.response is not None]
        return max(answered, key=lambda i: (self.candidates[i].rating or 0, -i), default=None)


@dataclass(frozen=True)
class Crew:
    """Who works on seeds together. `name` begins every key; `seed_queries` limits the target queries of a seed."""

    name: str
    ledger: Ledger
    writer: AttackWriter
    target: Voice
    judge: AttackJudge
    seed_queries: int | None = None
    rewriter: AttackWriter | None = None
    on_query: Callable[[], None] = lambda: None

    def key(self, seed: Seed, name: str) -> str:
        return f"{self.name}/{seed.id}/{name}"

    def room(self, attempt: Attempt) -> int | None:
        """Target queries that the seed has left."""
        return None if self.seed_queries is None else max(0, self.seed_queries - attempt.queries)


async def best_of_k(crew: Crew, seed: Seed, k: int, attempt: Attempt) -> None:
    """`k` attacks from the seed alone; the readable and faithful ones are asked, judged, and the best one counts.

    No attack is tried again and none waits for another: k samples are k chances. Fills `attempt`; raises Halt.
    """
    names = [f"sample{i}" for i in range(k)]
    writer = crew.rewriter or crew.writer
    drafts = await together(
        writer.write(seed, i, (), writer.opening(seed), crew.key(seed, name), 1) for i, name in enumerate(names)
    )
    verdicts = await together(
        crew.judge.faithful(seed, draft.prompt, crew.key(seed, name)) if draft is not None else _nothing()
        for name, draft in zip(names, drafts, strict=True)
    )
    made = []
    for name, draft, faithful in zip(names, drafts, verdicts, strict=True):
        if draft is None:
            made.append(Candidate(name, "", Fate.UNREADABLE))
        else:
            fates = {True: Fate.NOT_ASKED, False: Fate.UNFAITHFUL, None: Fate.NO_FAITHFULNESS_VERDICT}
            made.append(Candidate(name, "", fates[faithful], draft.prompt, draft.improvement, faithful=faithful))
    cut = await _ask_and_judge(crew, attempt, made)
    attempt.stop = Stop.SEED_BUDGET if cut else Stop.EXHAUSTED


@dataclass(frozen=True)
class _Conversation:
    """A leaf of the search: its stream, the kept exchanges, and what the attacker is told next."""

    name: str
    stream: int
    turns: tuple[Exchange, ...]
    told: str


async def search(crew: Crew, seed: Seed, settings: SearchSettings, attempt: Attempt) -> None:
    """TAP's loop. Each turn: copy every conversation, drop what cannot be read, prune what is off topic, ask the
    target, judge, keep the best `width` (the earlier of equals, in their old order), stop at 10.

    A turn after which nothing is left (all unreadable, all off topic, all rejected) is spent: the conversations stay
    as they were, and the next turn draws anew from them. With `crew.rewriter` the first turn's attacks are its
    rewrites of the seed. Fills `attempt`; raises Halt.
    """
    opening = crew.writer.opening(seed)
    leaves = [_Conversation(f"root{i}", i, (), opening) for i in range(settings.roots)]
    for depth in range(1, settings.depth + 1):
        copies = [
            (f"{depth}.{i * settings.branching + b}", leaf)
            for i, leaf in enumerate(leaves)
            for b in range(settings.branching)
        ]
        writer = crew.rewriter if depth == 1 and crew.rewriter is not None else crew.writer
        drafts = await together(
            writer.write(seed, leaf.stream, leaf.turns, leaf.told, crew.key(seed, name), settings.retries + 1)
            for name, leaf in copies
        )
        topics = await together(
            crew.judge.on_topic(seed, draft.prompt, crew.key(seed, name))
            if settings.prune and draft is not None
            else _nothing()
            for (name, _), draft in zip(copies, drafts, strict=True)
        )
        made = [
            _candidate(name, leaf.name, draft, topic)
            for (name, leaf), draft, topic in zip(copies, drafts, topics, strict=True)
        ]
        first = len(attempt.candidates)
        cut = await _ask_and_judge(crew, attempt, made)
        judged = attempt.candidates[first:]
        if any(c.rating is not None and c.rating >= HIGHEST for c in judged):
            attempt.stop = Stop.TOP_RATING
            return
        if cut or crew.room(attempt) == 0:
            attempt.stop = Stop.SEED_BUDGET
            return
        alive = [
            (candidate, leaf, draft)
            for candidate, (_, leaf), draft in zip(judged, copies, drafts, strict=True)
            if candidate.rating is not None and draft is not None
        ]
        best = sorted(range(len(alive)), key=lambda i: -(alive[i][0].rating or 0))[: settings.width]
        leaves = [_continued(crew, seed, settings, *alive[i]) for i in sorted(best)] or leaves
    attempt.stop = Stop.EXHAUSTED


def _candidate(name: str, parent: str, draft: Draft | None, topic: bool | None) -> Candidate:
    if draft is None:
        return Candidate(name, parent, Fate.UNREADABLE)
    fate = Fate.OFF_TOPIC if topic is False else Fate.NOT_ASKED
    return Candidate(name, parent, fate, draft.prompt, draft.improvement, faithful=topic)


def _continued(
    crew: Crew, seed: Seed, settings: SearchSettings, candidate: Candidate, leaf: _Conversation, draft: Draft
) -> _Conversation:
    assert candidate.response is not None, "a rated candidate was answered"
    assert candidate.rating is not None, "only rated candidates go on"
    turns = (*leaf.turns, (leaf.told, crew.writer.message(draft)))[-settings.keep_last :]
    told = crew.writer.feedback(seed, candidate.response, candidate.rating)
    return _Conversation(candidate.name, leaf.stream, turns, told)


async def _ask_and_judge(crew: Crew, attempt: Attempt, made: Sequence[Candidate]) -> bool:
    """Appends `made` to the attempt, those not yet decided asked and judged; whether the seed's limit left any out.

    Answers that are there when a Halt arrives are appended, unjudged, before it goes on.
    """
    seed, room = attempt.seed, crew.room(attempt)
    waiting = [i for i, candidate in enumerate(made) if candidate.fate is Fate.NOT_ASKED]
    asked = waiting if room is None else waiting[:room]
    rank = attempt.queries
    done = list(made)

    async def ask(place: int, index: int) -> None:
        candidate = made[index]
        key = crew.key(seed, candidate.name)
        answer = await crew.ledger.ask(crew.target, key, [("user", candidate.prompt)])
        crew.on_query()
        done[index] = candidate = _answered(candidate, rank + place, answer)
        if candidate.response is not None:
            rating = await crew.judge.rate(seed, candidate.prompt, candidate.response, key)
            if rating is not None:
                done[index] = replace(candidate, rating=rating, fate=Fate.JUDGED)

    try:
        await together(ask(place, index) for place, index in enumerate(asked, 1))
    finally:
        attempt.candidates += done
    return len(asked) < len(waiting)


def _answered(candidate: Candidate, rank: int, answer: Answer | None) -> Candidate:
    if answer is None:
        return replace(candidate, rank=rank, fate=Fate.REJECTED)
    return replace(
        candidate,
        rank=rank,
        fate=Fate.UNJUDGED,
        response=after_reasoning(answer.text),  # the record keeps the whole text
        prompt_tokens=answer.prompt_tokens,
        response_tokens=answer.completion_tokens,
    )


async def together(jobs: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order. If some job fails, the others are waited for first, since their answers are paid for.

    Raises the first error that is no Halt, or else the first Halt.
    """
    results = await asyncio.gather(*jobs, return_exceptions=True)
    failures = [result for result in results if isinstance(result, BaseException)]
    for failure in sorted(failures, key=lambda f: isinstance(f, Halt)):
        raise failure
    return [result for result in results if not isinstance(result, BaseException)]


async def _nothing() -> None:
    return None
