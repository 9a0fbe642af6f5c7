"""Pairs, clipping, groups, baselines and weights, each rule by itself."""

import pytest
from game.trees import BENIGN, HARMFUL, attack, pair, response, sample, tree
from hypothesis import given
from hypothesis import strategies as st

from advgame.game.pairs import Role, best_and_worst, clip_rejected, groups_of, pairs_of
from advgame.game.rewards import RewardRules, TreeRewards, tree_rewards

S = [sample(i, i + 1) for i in range(6)]


def test_best_against_worst():
    made = best_and_worst(S[:4], [3.0, 9.0, None, 1.0], "seed")
    assert (made.chosen, made.rejected) == (S[1], S[3])
    assert (made.chosen_reward, made.rejected_reward) == (9.0, 1.0)


@pytest.mark.parametrize("rewards", [[5.0, 5.0], [None, 5.0], [None, None], [], [-1.0, -1.0]])
def test_no_pair_from_equal_or_missing_rewards(rewards):
    assert best_and_worst(S[: len(rewards)], rewards, "seed") is None


def test_none_is_not_zero():
    made = best_and_worst(S[:3], [None, -1.0, 2.0], "seed")
    assert made.rejected == S[1]


def test_clipping_needs_max_length_and_more_tokens():
    chosen, longer = sample(1, 2), sample(1, 2, 3, 4)
    cut = clip_rejected(chosen, sample(1, 2, 3, 4, finish="length"))
    assert cut.token_ids == (1, 2)
    assert cut.logprobs == (-0.5, -0.5)
    assert clip_rejected(chosen, longer) is longer
    short = sample(1, finish="length")
    assert clip_rejected(chosen, short) is short


def test_a_defender_pair_survives_a_missing_attacker_verdict():
    answered = attack(response(1), response(2), verdicts=(pair(0, 1, 8, 3),))
    unjudged = tree(answered, answered, verdicts=(pair(0, 1),))
    scored = [(unjudged, tree_rewards(unjudged, RewardRules()))]
    assert len(pairs_of(Role.DEFENDER, scored)) == 2
    assert pairs_of(Role.ATTACKER, scored) == []


def test_one_pair_a_seed_for_the_attacker_one_an_attack_for_the_defender():
    one = attack(response(1), response(2), verdicts=(pair(0, 1, 8, 3),), token=9)
    two = attack(response(3), response(4), verdicts=(pair(0, 1, 4, 5),), token=8)
    played = tree(one, two, verdicts=(pair(0, 1, 2, 7),))
    scored = [(played, tree_rewards(played, RewardRules()))] * 2
    attacker, defender = pairs_of(Role.ATTACKER, scored), pairs_of(Role.DEFENDER, scored)
    assert len(attacker) == 2
    assert attacker[0].chosen == two.sample
    assert [p.chosen for p in defender[:2]] == [one.responses[0].sample, two.responses[1].sample]


def scored_tree(seed, attack_rewards, response_rewards):
    attacks = [attack(*(response(10 * a + d) for d in range(len(r)))) for a, r in enumerate(response_rewards)]
    return tree(*attacks, seed=seed), TreeRewards(tuple(attack_rewards), tuple(map(tuple, response_rewards)))


def test_group_baselines_across_seeds_and_per_seed():
    scored = [
        scored_tree(HARMFUL, [2.0, -1.0], [[4.0, 0.0], [None, -1.0]]),
        scored_tree(BENIGN, [6.0, None], [[1.0, 3.0], [None, None]]),
    ]
    across = groups_of(Role.ATTACKER, scored, across_seeds=True)
    assert [[m.advantage for m in g.members] for g in across] == [
        pytest.approx([2 - 7 / 3, -1 - 7 / 3]),
        pytest.approx([6 - 7 / 3]),
    ]
    assert [[m.weight for m in g.members] for g in across] == [[1.0, 0.0], [1.0]]
    per_seed = groups_of(Role.DEFENDER, scored, across_seeds=False)
    assert [[m.advantage for m in g.members] for g in per_seed] == [[3.0, -1.0, -2.0], [-1.0, 1.0]]


def test_self_redteam_learns_from_formatting_failures():
    scored = [scored_tree(HARMFUL, [2.0, -1.0], [[], []])]
    (group,) = groups_of(Role.ATTACKER, scored, across_seeds=True, learn_from_failed=True)
    assert [m.weight for m in group.members] == [1.0, 1.0]


@given(st.lists(st.none() | st.floats(-1, 10), min_size=1, max_size=6))
def test_a_pair_is_ordered_and_spans_the_rewards(rewards):
    made = best_and_worst(S[: len(rewards)], rewards, "seed")
    known = [r for r in rewards if r is not None]
    if made is None:
        assert len(set(known)) < 2
    else:
        assert (made.chosen_reward, made.rejected_reward) == (max(known), min(known))
        assert made.chosen_reward > made.rejected_reward
