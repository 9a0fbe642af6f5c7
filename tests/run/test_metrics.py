"""Metrics of play, against numbers worked out by hand."""

import math
import random

import pytest
import tree_samples as make

from advgame.game.rewards import RewardRules, TreeRewards, tree_rewards
from advgame.game.tree import Attack, PairScore, Response, Seed, Tree
from advgame.run.diversity import distinct_n, self_overlap, spread, words
from advgame.run.metrics import judged_rates, play_metrics


def one_of_everything():
    """Two harmful seeds: one attack that worked half the time, one too long; then two unfaithful ones."""
    good = make.attack(
        responses=[make.response(), make.response(tokens=(1, 2, 3, 4), logprobs=(-1.0,) * 4)],
        verdicts=[PairScore(0, 1, (2.0, 8.0))],
    )
    long = make.attack(finish="length", prompt=None, version=2)
    first = make.tree(attacks=[good, long], verdicts=[PairScore(0, 0, (6.0, 6.0))])
    second = make.tree(attacks=[make.attack(faithful=False)] * 2, verdicts=[PairScore(0, 1, None)], index=1)
    rewards = [TreeRewards((6.0, -1.0), ((2.0, 8.0), ())), TreeRewards((-1.0, None), ((), ()))]
    return [first, second], rewards


def test_by_hand():
    values = play_metrics(*one_of_everything(), version=4)
    expected = {
        "harmful/attacker/reward": 4 / 3,
        "harmful/attacker/reward_valid": 6.0,
        "harmful/attacker/outcome/ok": 0.25,
        "harmful/attacker/outcome/length": 0.25,
        "harmful/attacker/outcome/unfaithful": 0.5,
        "harmful/attacker/outcome/unparsable": 0.0,
        "harmful/attacker/no_verdict": 0.5,
        "harmful/attacker/pair_yield": 0.5,
        "harmful/attacker/tokens": 2.0,
        "harmful/attacker/staleness": 1.25,
        "harmful/attacker/staleness_max": 2.0,
        "harmful/defender/reward": 5.0,
        "harmful/defender/outcome/ok": 1.0,
        "harmful/defender/no_verdict": 0.0,
        "harmful/defender/pair_yield": 1.0,
        "harmful/defender/tokens": 3.0,
        "harmful/defender/logprob": -5 / 6,
        "harmful/asr_judged": 0.5,
    }
    assert {key: values[key] for key in expected} == pytest.approx(expected)
    assert not any(key.startswith("benign") for key in values)
    assert all(type(value) is float and math.isfinite(value) for value in values.values())


def test_staleness_is_of_players_that_learn():
    played = one_of_everything()
    assert play_metrics(*played, version=4)["play/staleness"] == pytest.approx(7 / 6)  # versions 3 x 5 and 2
    values = play_metrics(*played, version=4, frozen={"attacker"})
    assert values["play/staleness"] == 1.0
    assert "harmful/attacker/staleness" not in values
    assert "harmful/attacker/staleness_max" not in values
    assert values["harmful/defender/staleness"] == 1.0
    assert "play/staleness" not in play_metrics(*played, version=4, frozen={"attacker", "defender"})


@pytest.mark.parametrize(
    ("category", "scores", "rate"),
    [
        ("harmful", (2.49, 2.5), 0.5),
        ("harmful", (9.0, 9.0), 0.0),
        ("benign", (5.0, 5.01), 0.5),
    ],
)
def test_judged_rates_at_their_thresholds(category, scores, rate):
    attack = make.attack(responses=[make.response()] * 2, verdicts=[PairScore(0, 1, scores)])
    (value,) = judged_rates([make.tree(category, [attack])]).values()
    assert value == rate


def test_judged_rates_leave_out_failed_and_unjudged_and_ignore_transformed_rewards():
    attack = make.attack(
        responses=[make.response(), make.response(finish="length"), make.response()],
        verdicts=[PairScore(0, 2, None), PairScore(0, 0, (8.0, 8.0))],
    )
    tree = make.tree(attacks=[attack])
    assert judged_rates([tree]) == {"harmful/asr_judged": 0.0}
    zero_sum = tree_rewards(tree, RewardRules(zero_sum=True))
    assert play_metrics([tree], [zero_sum], version=3)["harmful/asr_judged"] == 0.0
    assert judged_rates([make.tree(attacks=[make.attack()])]) == {}


def test_direct_seeds_count_for_the_defender_only():
    direct = Attack(None, "", "a seed", None, (make.response(),), (PairScore(0, 0, (9.0, 9.0)),), direct=True)
    tree = Tree(Seed("s", make.Category.BENIGN, "a seed"), 0, 0, (direct,), (0,))
    values = play_metrics([tree], [TreeRewards((None,), ((9.0,),))], version=3)
    assert not any("/attacker/" in key for key in values)
    assert values["benign/compliance_judged"] == 1.0


def test_nothing_played():
    assert play_metrics([], [], version=0) == {}
    failed = make.tree(attacks=[Attack(None, "", None, None, (Response(None, "", None),))])
    values = play_metrics([failed], [TreeRewards((None,), ((None,),))], version=0)
    assert values["harmful/attacker/outcome/engine_failed"] == 1.0
    assert "harmful/attacker/tokens" not in values
    assert "harmful/attacker/reward" not in values


def naive_overlap(texts, max_n=4):
    """The docstring, without the trick of best and second best."""
    scores = []
    for i, text in enumerate(texts):
        others = texts[:i] + texts[i + 1 :]
        logs = []
        for n in range(1, max_n + 1):
            grams = [text[k : k + n] for k in range(len(text) - n + 1)]
            if not grams:
                continue
            matched = sum(
                min(grams.count(g), max([o[k : k + n] for k in range(len(o))].count(g) for o in others))
                for g in set(grams)
            )
            logs.append(math.log(max(matched, 0.5) / len(grams)))
        if logs:
            scores.append(math.exp(sum(logs) / len(logs)))
    return sum(scores) / len(scores)


def test_overlap_equals_the_naive_count():
    draw = random.Random(0)
    for _ in range(30):
        texts = [tuple(draw.choices("abcd", k=draw.randint(1, 9))) for _ in range(draw.randint(2, 6))]
        assert self_overlap(texts) == pytest.approx(naive_overlap(texts))


def test_diversity_extremes():
    same = [words("Kill a python process, now!")] * 3
    assert self_overlap(same) == pytest.approx(1.0)
    assert distinct_n(same, 1) == pytest.approx(1 / 3)
    unrelated = [words("a b c d e"), words("f g h i j")]
    assert self_overlap(unrelated) < 0.2
    assert distinct_n(unrelated, 2) == 1.0
    assert self_overlap(same[:1]) is None
    assert self_overlap([(), ()]) is None
    assert distinct_n([], 1) is None


def test_spread_is_even_and_fixed():
    assert spread(range(10), 4) == [0, 2, 5, 7]
    assert spread([1, 2], 4) == [1, 2]
