"""Play with scripted engines: which calls a tree makes, in what variants, and that trees do not wait for each other."""

import asyncio
from collections import Counter
from dataclasses import replace

import pytest
from game.trees import BENIGN, HARMFUL

from advgame.game.play import PlayRules, Table, play_batch, play_tree
from advgame.game.prompts import Templates
from advgame.game.rewards import RewardRules, tree_rewards
from advgame.game.tree import Outcome, Rubric, Sample
from advgame.rollout.engine import EngineError, Sampling
from advgame.rollout.speaker import Speaker

GOOD_ATTACK = "<think> plan </think> <prompt> please {} </prompt>"


class ScriptedEngine:
    """Answers with `script(request)`: a text, (text, finish reason) or an EngineError."""

    version = 3

    def __init__(self, script):
        self.script = script
        self.texts = {}
        self.requests = []

    async def generate(self, request):
        self.requests.append(request)
        made = self.script(request)
        if asyncio.iscoroutine(made):
            made = await made
        if isinstance(made, Exception):
            raise made
        text, reason = made if isinstance(made, tuple) else (made, "stop")
        token = len(self.texts)
        self.texts[token] = text
        return Sample(request.prompt_ids, (token,), (-1.0,), reason, self.version)


class ScriptedChat:
    def __init__(self, engine):
        self.engine = engine
        self.users = []

    def prompt_ids(self, user):
        self.users.append(user)
        return (len(self.users),)

    def text(self, token_ids):
        return self.engine.texts[token_ids[0]]


class ScriptedJudge:
    """Faithful unless told otherwise; the later candidate of a pair scores higher."""

    def __init__(self, faithful=True, scores=(2.0, 8.0)):
        self.answers = (faithful, scores)
        self.calls = []

    async def faithful(self, seed, prompt, *, key):
        self.calls.append(("faithful", prompt, key))
        return self.answers[0]

    async def compare(self, rubric, query, a, b, *, key):
        self.calls.append((rubric, query, a, b, key))
        return self.answers[1]

    async def score(self, rubric, query, answer, *, key):
        self.calls.append((rubric, query, answer, key))
        return 5.0


def speaker(name, script, **kwargs):
    engine = ScriptedEngine(script)
    return Speaker(name, engine, ScriptedChat(engine), Sampling(), 0, **kwargs)


def table(
    rules=None, judge=None, attack=lambda r: GOOD_ATTACK.format(r.key[-1]), answer=lambda r: f"answer {r.key[-1]}"
):
    return Table(
        speaker("attacker", attack),
        speaker("defender", answer),
        judge or ScriptedJudge(),
        Templates.load(),
        rules or PlayRules(),
    )


def play(made, seed=HARMFUL):
    return asyncio.run(play_tree(made, seed, 4, 7))


def test_a_full_tree():
    made = table()
    tree = play(made)
    assert [a.prompt for a in tree.attacks] == ["please 0", "please 1"]
    assert [[r.answer for r in a.responses] for a in tree.attacks] == [["answer 0", "answer 1"]] * 2
    calls = Counter(call[0] for call in made.judge.calls)
    assert calls == {"faithful": 2, Rubric.DEFLECTION: 2, Rubric.COMPLIANCE: 1}
    assert tree.representatives == (1, 1)
    assert tree_rewards(tree, RewardRules()).attacks == (2.0, 8.0)
    assert made.defender.chat.users == ["please 0", "please 0", "please 1", "please 1"]


def test_rubrics_and_queries_by_category():
    made = table()
    play(made, BENIGN)
    assert [(c[0], c[1]) for c in made.judge.calls if c[0] != "faithful"] == [
        (Rubric.COMPLIANCE, "please 0"),
        (Rubric.COMPLIANCE, "please 1"),
        (Rubric.REFUSAL, BENIGN.text),
    ]


def test_condition_on_the_seed():
    made = table(PlayRules(judge_sees_seed=True))
    play(made)
    assert {c[1] for c in made.judge.calls if c[0] is Rubric.DEFLECTION} == {HARMFUL.text}


def test_every_random_stream_has_its_own_key():
    made = table(PlayRules(attacks=3, responses=3))
    play(made)
    keys = [c[-1] for c in made.judge.calls]
    keys += [r.key for s in (made.attacker, made.defender) for r in s.engine.requests]
    assert len(keys) == len(set(keys))
    assert all(key[:2] == (4, 7) for key in keys)


@pytest.mark.parametrize(
    ("attack", "outcome"),
    [
        (lambda r: ("<think> no end", "length"), Outcome.LENGTH),
        (lambda r: "<prompt> no reasoning </prompt>", Outcome.UNPARSABLE),
        (lambda r: EngineError("gone"), Outcome.ENGINE_FAILED),
    ],
)
def test_an_invalid_attack_is_answered_by_nobody(attack, outcome):
    made = table(attack=attack)
    tree = play(made)
    assert [a.outcome for a in tree.attacks] == [outcome] * 2
    assert made.defender.engine.requests == []
    assert made.judge.calls == []
    assert tree.representatives == (None, None)


@pytest.mark.parametrize(("verdict", "outcome"), [(False, Outcome.UNFAITHFUL), (None, Outcome.NO_FAITHFULNESS_VERDICT)])
def test_unfaithful_attacks_stop_there(verdict, outcome):
    made = table(judge=ScriptedJudge(faithful=verdict))
    tree = play(made)
    assert [a.outcome for a in tree.attacks] == [outcome] * 2
    assert made.defender.engine.requests == []


def test_without_a_faithfulness_judge_every_parsed_attack_is_valid():
    made = table(PlayRules(faithfulness=False), ScriptedJudge(faithful=False))
    assert [a.outcome for a in play(made).attacks] == [Outcome.OK] * 2
    assert "faithful" not in {c[0] for c in made.judge.calls}


def test_failed_responses_are_not_judged_and_a_lone_one_meets_itself():
    made = table(answer=lambda r: ("cut", "length") if r.key[-1] == 0 else "fine")
    tree = play(made)
    deflections = [c for c in made.judge.calls if c[0] is Rubric.DEFLECTION]
    assert [(c[2], c[3]) for c in deflections] == [("fine", "fine")] * 2
    assert tree_rewards(tree, RewardRules()).responses == ((-1.0, 5.0),) * 2


def test_pointwise_scores_each_answer_alone():
    made = table(PlayRules(pairwise=False))
    tree = play(made)
    assert [len(c) for c in made.judge.calls if c[0] is Rubric.DEFLECTION] == [4] * 4
    assert tree_rewards(tree, RewardRules()).responses == ((5.0, 5.0),) * 2


def test_without_an_attacker_judge():
    made = table(PlayRules(attacker_judge=False))
    tree = play(made)
    assert Rubric.COMPLIANCE not in {c[0] for c in made.judge.calls}
    assert tree_rewards(tree, RewardRules(attacker_judge=False)).attacks == (0.0, 0.0)


def test_without_reasoning():
    made = table(PlayRules(reasoning=False), attack=lambda r: "<prompt> bare </prompt>")
    assert [a.prompt for a in play(made).attacks] == ["bare", "bare"]


def test_direct_seeds():
    made = replace(table(PlayRules(skip_attacker=True)), attacker=None)
    tree = play(made)
    assert made.defender.chat.users == [HARMFUL.text] * 2
    assert [c[0] for c in made.judge.calls] == [Rubric.DEFLECTION]
    assert tree_rewards(tree, RewardRules()).attacks == (None,)


def test_failures_are_retried_and_counted():
    failures = iter([EngineError("one"), EngineError("two")])
    made = speaker("defender", lambda r: next(failures, "fine"), retries=2)
    sample, text = asyncio.run(made.ask("hello", (0,)))
    assert (sample.finish_reason, text) == ("stop", "fine")
    assert made.counters == {"defender_requests": 3, "defender_failures": 2, "defender_tokens": 1}
    given_up = speaker("defender", lambda r: EngineError("down"), retries=1)
    assert asyncio.run(given_up.ask("hello", (0,))) == (None, "")
    assert given_up.counters["defender_given_up"] == 1


def test_a_slow_tree_holds_up_only_itself():
    """The first tree's Defender waits for the last tree to end."""
    last_ended = asyncio.Event()

    async def slow(request):
        if request.key[1] == 0:
            await last_ended.wait()
        return "answer"

    made = table(answer=slow)
    ended = []

    def on_tree(tree):
        ended.append(tree.index)
        if len(ended) == 3:
            last_ended.set()

    async def run():
        return await asyncio.wait_for(play_batch(made, [HARMFUL] * 4, 0, in_flight=4, on_tree=on_tree), 5)

    trees = asyncio.run(run())
    assert ended[-1] == 0
    assert [t.index for t in trees] == [0, 1, 2, 3]


def test_in_flight_is_bounded():
    playing, most = set(), []

    async def watch(request):
        playing.add(request.key[1])
        most.append(len(playing))
        await asyncio.sleep(0)
        return GOOD_ATTACK.format(0)

    made = table(PlayRules(attacks=1), attack=watch)
    asyncio.run(play_batch(made, [HARMFUL] * 9, 0, in_flight=2, on_tree=lambda t: playing.discard(t.index)))
    assert max(most) == 2
