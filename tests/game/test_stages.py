"""The rival of `bench play`: stage by stage it plays the very trees that are played without barriers."""

import asyncio
import random
import statistics

from game.trees import BENIGN, HARMFUL

from advgame.game.play import PlayRules, Table, play_batch
from advgame.game.prompts import Templates
from advgame.game.tree import Outcome, Sample
from advgame.rollout.engine import Sampling
from advgame.rollout.speaker import Speaker
from bench.play_cast import DEVIATION, PROMPT, HashJudge, Words, seeds_of
from bench.stages import play_stages


class Tokens:
    """Tokens and delays that depend on the request alone; now and then a completion is cut off."""

    version = 0

    async def generate(self, request):
        draw = random.Random(request.seed)
        await asyncio.sleep(draw.random() / 100)
        ids = tuple(draw.randrange(256) for _ in range(draw.randint(1, 5)))
        return Sample(request.prompt_ids, ids, (-1.0,) * len(ids), draw.choice(["stop"] * 9 + ["length"]), 0)


def test_both_ways_play_the_same_trees():
    def speaker(name, frame="{}"):
        return Speaker(name, Tokens(), Words(frame), Sampling(), 0)

    templates = Templates.load()
    attacker = speaker("attacker", "<think> why </think> <prompt> {} </prompt>")
    judge = HashJudge(speaker("judge"), templates)
    table = Table(attacker, speaker("defender"), judge, templates, PlayRules(attacks=3))
    seeds = [HARMFUL, BENIGN] * 8
    free = asyncio.run(play_batch(table, seeds, 2, in_flight=5))
    assert asyncio.run(play_stages(table, seeds, 2)) == free
    outcomes = {attack.outcome for tree in free for attack in tree.attacks}
    assert {Outcome.OK, Outcome.UNFAITHFUL, Outcome.LENGTH} <= outcomes


def test_the_attackers_prompts_have_the_stated_lengths():
    templates, words = Templates.load(), Words()
    seeds = seeds_of(400, templates)
    assert seeds == seeds_of(400, templates)
    lengths = [len(words.prompt_ids(templates.attacker(seed))) for seed in seeds]
    assert abs(statistics.mean(lengths) - PROMPT) < 3
    assert abs(statistics.stdev(lengths) - DEVIATION) < 3
