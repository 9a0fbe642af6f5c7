"""A batch played stage by stage, as published, for `bench play` to be measured against: a barrier after every stage."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from advgame.game.judge import judge_candidates
from advgame.game.parsing import parse_attack, parse_response
from advgame.game.play import Stream, Table
from advgame.game.rewards import representative
from advgame.game.tree import Attack, Outcome, Response, Seed, Tree, attacker_rubric, defender_rubric


async def play_stages(table: Table, seeds: Sequence[Seed], step: int) -> list[Tree]:
    """A batch with a barrier after every stage; the same keys, so the same trees as `play_batch`."""
    assert table.attacker is not None, "this game has an Attacker"
    rules, ask = table.rules, table.attacker.ask
    places = [(t, a) for t in range(len(seeds)) for a in range(rules.attacks)]
    made = await asyncio.gather(
        *(ask(table.templates.attacker(seeds[t]), (step, t, Stream.ATTACK, a)) for t, a in places)
    )
    prompts = [
        parse_attack(text, reasoning=rules.reasoning) if sample is not None and sample.finished else None
        for sample, text in made
    ]

    async def faithful(t: int, a: int, prompt: str | None) -> bool | None:
        if prompt is None:
            return None
        return await table.judge.faithful(seeds[t], prompt, key=(step, t, Stream.FAITHFUL, a))

    verdicts = await asyncio.gather(*(faithful(t, a, p) for (t, a), p in zip(places, prompts, strict=True)))
    attacks = [Attack(*one, prompt, verdict) for one, prompt, verdict in zip(made, prompts, verdicts, strict=True)]

    async def responses(t: int, a: int, attack: Attack) -> tuple[Response, ...]:
        if attack.outcome is not Outcome.OK or attack.prompt is None:
            return ()
        text = table.templates.defender(attack.prompt)
        said = await asyncio.gather(
            *(table.defender.ask(text, (step, t, Stream.RESPONSE, a, d)) for d in range(rules.responses))
        )
        return tuple(Response(s, answer, parse_response(answer, reasoning=False)) for s, answer in said)

    answered = await asyncio.gather(*(responses(t, a, x) for (t, a), x in zip(places, attacks, strict=True)))

    async def judged(t: int, a: int, attack: Attack, group: Sequence[Response]) -> Attack:
        if not group or attack.prompt is None:
            return attack
        scored = await judge_candidates(
            table.judge,
            defender_rubric(seeds[t].category),
            attack.prompt,
            [(d, r.answer) for d, r in enumerate(group) if r.outcome is Outcome.OK and r.answer is not None],
            pairwise=True,
            key=(step, t, Stream.DEFENDER_JUDGE, a),
        )
        return replace(attack, responses=tuple(group), verdicts=scored)

    finished = await asyncio.gather(
        *(judged(t, a, x, group) for (t, a), x, group in zip(places, attacks, answered, strict=True))
    )

    async def tree(t: int) -> Tree:
        own = finished[t * rules.attacks : (t + 1) * rules.attacks]
        chosen = tuple(representative(attack, rules.optimistic) for attack in own)
        candidates = [
            (a, answer)
            for a, (attack, d) in enumerate(zip(own, chosen, strict=True))
            if d is not None and (answer := attack.responses[d].answer) is not None
        ]
        rubric, key = attacker_rubric(seeds[t].category), (step, t, Stream.ATTACKER_JUDGE)
        scored = await judge_candidates(table.judge, rubric, seeds[t].text, candidates, pairwise=True, key=key)
        return Tree(seeds[t], step, t, tuple(own), chosen, scored)

    return list(await asyncio.gather(*(tree(t) for t in range(len(seeds)))))
