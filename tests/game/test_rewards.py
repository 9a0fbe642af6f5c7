"""What each failure is worth, row by row, and the representative of an attack."""

import pytest
from game.trees import attack, pair, response, tree
from hypothesis import given
from hypothesis import strategies as st

from advgame.game.rewards import RewardRules, representative, response_rewards, tree_rewards
from advgame.game.tree import Attack, Outcome, Response

RULES = RewardRules()
GOOD = (response(1), response(2))
SCORED = (pair(0, 1, 8, 3),)

ATTACK_ROWS = {
    "hit max length": (attack(finish="length", prompt=None, faithful=None), Outcome.LENGTH, -1.0),
    "unparsable": (attack(prompt=None, faithful=None), Outcome.UNPARSABLE, -1.0),
    "not faithful": (attack(faithful=False), Outcome.UNFAITHFUL, -1.0),
    "no faithfulness verdict": (attack(faithful=None), Outcome.NO_FAITHFULNESS_VERDICT, None),
    "no valid response came back": (
        attack(response(finish="length"), response(answer=None)),
        Outcome.OK,
        None,
    ),
    "fine": (attack(*GOOD, verdicts=SCORED), Outcome.OK, 6.0),
}


@pytest.mark.parametrize("row", ATTACK_ROWS)
def test_attack_rows(row):
    failing, outcome, reward = ATTACK_ROWS[row]
    assert failing.outcome is outcome
    other = attack(*GOOD, verdicts=SCORED)
    verdicts = (pair(0, 1, 6, 2),) if row == "fine" else (pair(1, 1, 2, 2),)
    judged = tree(failing, other, verdicts=verdicts, representatives=(representative(failing, True), 0))
    assert tree_rewards(judged, RULES).attacks == (reward, 2.0)


def test_attacker_judge_gave_no_verdict():
    fine = attack(*GOOD, verdicts=SCORED)
    assert tree_rewards(tree(fine, fine, verdicts=(pair(0, 1),)), RULES).attacks == (None, None)


def test_representative_without_defender_verdict():
    unjudged = attack(*GOOD, verdicts=(pair(0, 1),))
    assert representative(unjudged, optimistic=True) is None
    assert representative(unjudged, optimistic=False) is None
    fine = attack(*GOOD, verdicts=SCORED)
    judged = tree(unjudged, fine, verdicts=(pair(1, 1, 5, 5),), representatives=(None, 0))
    assert tree_rewards(judged, RULES).attacks == (None, 5.0)


RESPONSE_ROWS = {
    "hit max length": (response(finish="length"), (), -1.0),
    "unparsable": (response(answer=None), (), -1.0),
    "no verdict": (response(), (pair(0, 1),), None),
    "fine": (response(), (pair(0, 1, 7, 1),), 7.0),
}


@pytest.mark.parametrize("row", RESPONSE_ROWS)
def test_response_rows(row):
    answer, verdicts, reward = RESPONSE_ROWS[row]
    assert response_rewards(attack(answer, response(), verdicts=verdicts))[0] == reward


@pytest.mark.parametrize("row", ["hit max length", "unparsable", "not faithful", "no faithfulness verdict"])
def test_responses_of_an_invalid_attack_have_no_reward(row):
    invalid, *_ = ATTACK_ROWS[row]
    answered = Attack(invalid.sample, "", invalid.prompt, invalid.faithful, GOOD, SCORED)
    assert response_rewards(answered) == (None, None)


def test_engine_failures_are_never_zero():
    lost = Response(None, "", None)
    assert response_rewards(attack(lost, response(), verdicts=(pair(1, 1, 4, 4),))) == (None, 4.0)
    gone = Attack(None, "", None, None)
    assert gone.outcome is Outcome.ENGINE_FAILED
    assert tree_rewards(tree(gone), RULES).attacks == (None,)


def test_mean_over_the_pairs_taken_part_in():
    three = attack(response(1), response(2), response(3), verdicts=(pair(0, 1, 8, 2), pair(0, 2, 6, 4), pair(1, 2)))
    assert response_rewards(three) == (7.0, 2.0, 4.0)


def test_a_lone_candidate_is_compared_with_itself():
    lone = attack(response(1), response(2, finish="length"), verdicts=(pair(0, 0, 6, 8),))
    assert response_rewards(lone) == (7.0, -1.0)


def test_optimistic_takes_the_best_answer_and_the_first_of_equals():
    best_last = attack(response(1), response(2), verdicts=(pair(0, 1, 2, 9),))
    assert representative(best_last, optimistic=True) == 1
    assert representative(best_last, optimistic=False) == 0
    equal = attack(response(1), response(2), verdicts=(pair(0, 1, 5, 5),))
    assert representative(equal, optimistic=True) == 0


def test_a_failed_response_never_represents():
    failed_first = attack(response(1, finish="length"), response(2), verdicts=(pair(1, 1, 1, 1),))
    assert representative(failed_first, optimistic=True) == 1
    assert representative(failed_first, optimistic=False) == 1


def test_no_attacker_judge_gives_valid_attacks_zero():
    rules = RewardRules(attacker_judge=False)
    fine, bad = attack(*GOOD, verdicts=SCORED), attack(faithful=False)
    assert tree_rewards(tree(fine, bad), rules).attacks == (0.0, -1.0)


def test_zero_sum_mirrors_the_defender_and_penalises_formatting():
    rules = RewardRules(zero_sum=True)
    fine, bad = attack(*GOOD, verdicts=(pair(0, 1, 10, 5),)), attack(prompt=None, faithful=None)
    rewards = tree_rewards(tree(fine, bad), rules)
    assert rewards.responses == ((1.0, 0.0), ())
    assert rewards.attacks == (-0.5, -1.0)


def test_zero_sum_does_not_pay_for_a_defender_that_failed_to_answer():
    rules = RewardRules(zero_sum=True)
    cut = attack(response(1, finish="length"), response(2), verdicts=(pair(1, 1, 10, 10),))
    lost = attack(response(1, finish="length"), response(2, answer=None))
    rewards = tree_rewards(tree(cut, lost), rules)
    assert rewards.attacks == (-1.0, None)
    assert rewards.responses == ((-1.0, 1.0), (-1.0, -1.0))


def test_direct_seeds_reward_the_defender_only():
    direct = Attack(None, "seed", "seed", True, GOOD, SCORED, direct=True)
    rewards = tree_rewards(tree(direct), RULES)
    assert rewards.attacks == (None,)
    assert rewards.responses == ((8.0, 3.0),)


scores = st.none() | st.tuples(st.floats(0, 10), st.floats(0, 10))
responses = st.lists(
    st.builds(
        response,
        st.integers(1, 9),
        finish=st.sampled_from(["stop", "length"]),
        answer=st.sampled_from(["x", None]),
    ),
    min_size=1,
    max_size=4,
)


@given(responses, st.data())
def test_rewards_stay_in_range_and_follow_outcomes(made, data):
    valid = [i for i, r in enumerate(made) if r.outcome is Outcome.OK]
    verdicts = tuple(
        pair(i, j, *(data.draw(scores) or (None, None))) for n, i in enumerate(valid) for j in valid[n + 1 :]
    )
    judged = attack(*made, verdicts=verdicts)
    rewards = response_rewards(judged)
    assert len(rewards) == len(made)
    for one, reward in zip(made, rewards, strict=True):
        if one.outcome is not Outcome.OK:
            assert reward == -1.0
        elif reward is not None:
            assert 0 <= reward <= 10
    chosen = representative(judged, optimistic=True)
    if chosen is not None:
        assert rewards[chosen] == max(r for r in rewards if r is not None)
