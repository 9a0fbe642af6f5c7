"""Play: one coroutine a tree, from seed to verdicts, with no barrier between trees.

Every random stream is named by (step, tree, role, ...), so that what a tree samples does not depend on which
other trees are in flight.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from advgame.game.judge import Judge, Key, judge_candidates
from advgame.game.parsing import parse_attack, parse_response
from advgame.game.prompts import Templates
from advgame.game.rewards import representative
from advgame.game.tree import (
    Attack,
    Outcome,
    PairScore,
    Response,
    Seed,
    Tree,
    attacker_rubric,
    defender_rubric,
)
from advgame.rollout.speaker import Speaker


class Stream(IntEnum):
    """The third part of a key: which call of a tree it names."""

    ATTACK = 0
    FAITHFUL = 1
    RESPONSE = 2
    DEFENDER_JUDGE = 3
    ATTACKER_JUDGE = 4


@dataclass(frozen=True)
class PlayRules:
    """One configuration of the game (docs/game.md)."""

    attacks: int = 2
    responses: int = 2
    faithfulness: bool = True
    attacker_judge: bool = True
    optimistic: bool = True
    pairwise: bool = True
    reasoning: bool = True
    defender_reasoning: bool = False
    judge_sees_seed: bool = False
    skip_attacker: bool = False


@dataclass(frozen=True)
class Table:
    """Who sits at the game: two speakers, a judge, their texts and the rules."""

    attacker: Speaker | None
    defender: Speaker
    judge: Judge
    templates: Templates
    rules: PlayRules


async def play_batch(
    table: Table,
    seeds: Sequence[Seed],
    step: int,
    *,
    in_flight: int,
    on_tree: Callable[[Tree], None] | None = None,
    only: Collection[int] | None = None,
) -> list[Tree]:
    """The trees of `seeds` in their order, at most `in_flight` at a time; `on_tree` is told of each as it ends.

    only: indices of the seeds to play; None: all.
    """
    places = asyncio.Semaphore(in_flight)

    async def one(index: int, seed: Seed) -> Tree:
        async with places:
            tree = await play_tree(table, seed, step, index)
        if on_tree is not None:
            on_tree(tree)
        return tree

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(i, seed)) for i, seed in enumerate(seeds) if only is None or i in only]
    return [task.result() for task in tasks]


async def play_tree(table: Table, seed: Seed, step: int, index: int) -> Tree:
    """All attacks on one seed, their responses, and every verdict."""
    key = (step, index)
    if table.rules.skip_attacker:
        direct = Attack(sample=None, text=seed.text, prompt=seed.text, faithful=True, direct=True)
        attacks = [await _answer(table, seed, direct, (*key, 0))]
    else:
        attacks = await asyncio.gather(*(_attack(table, seed, key, a) for a in range(table.rules.attacks)))
    representatives = tuple(representative(attack, table.rules.optimistic) for attack in attacks)
    tree = Tree(seed, step, index, tuple(attacks), representatives)
    if not table.rules.attacker_judge or table.rules.skip_attacker:
        return tree
    return replace(tree, verdicts=await _judge_attacks(table, tree, key))


async def _attack(table: Table, seed: Seed, key: Key, a: int) -> Attack:
    """One attack and everything below it."""
    assert table.attacker is not None, "a game with an Attacker needs its speaker"
    rules = table.rules
    sample, text = await table.attacker.ask(table.templates.attacker(seed), (*key, Stream.ATTACK, a))
    prompt = parse_attack(text, reasoning=rules.reasoning) if sample is not None and sample.finished else None
    faithful: bool | None = None
    if prompt is not None:
        faithful = True
        if rules.faithfulness:
            faithful = await table.judge.faithful(seed, prompt, key=(*key, Stream.FAITHFUL, a))
    attack = Attack(sample, text, prompt, faithful)
    return await _answer(table, seed, attack, (*key, a)) if attack.outcome is Outcome.OK else attack


async def _answer(table: Table, seed: Seed, attack: Attack, key: Key) -> Attack:
    """`attack` with the Defender's responses and the verdicts on them. `key` is (step, tree, attack)."""
    step, index, a = key
    assert attack.prompt is not None, "only valid attacks are answered"
    responses = await asyncio.gather(
        *(_respond(table, attack.prompt, (step, index, Stream.RESPONSE, a, d)) for d in range(table.rules.responses))
    )
    candidates = [(d, r.answer) for d, r in enumerate(responses) if r.outcome is Outcome.OK and r.answer is not None]
    verdicts = await judge_candidates(
        table.judge,
        defender_rubric(seed.category),
        seed.text if table.rules.judge_sees_seed else attack.prompt,
        candidates,
        pairwise=table.rules.pairwise,
        key=(step, index, Stream.DEFENDER_JUDGE, a),
    )
    return replace(attack, responses=tuple(responses), verdicts=verdicts)


async def _respond(table: Table, prompt: str, key: Key) -> Response:
    sample, text = await table.defender.ask(table.templates.defender(prompt), key)
    return Response(sample, text, parse_response(text, reasoning=table.rules.defender_reasoning))


async def _judge_attacks(table: Table, tree: Tree, key: Key) -> tuple[PairScore, ...]:
    """The Attacker judge's verdicts on the representatives, judged against the seed."""
    candidates = []
    for a, (attack, d) in enumerate(zip(tree.attacks, tree.representatives, strict=True)):
        if d is not None and (answer := attack.responses[d].answer) is not None:
            candidates.append((a, answer))
    return await judge_candidates(
        table.judge,
        attacker_rubric(tree.seed.category),
        tree.seed.text,
        candidates,
        pairwise=table.rules.pairwise,
        key=(*key, Stream.ATTACKER_JUDGE),
    )
