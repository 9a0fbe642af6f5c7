"""Signs of failure: each rule says yes where it should, no where it should, and unknown without data."""

import random

import pytest

from advgame.report.series import Series
from advgame.report.signs import joint_rises, reward_hacking, signs_of
from advgame.run import names

REWARD = names.reward("harmful", "defender")
HELDOUT = f"validation/plain/{names.ASR}"


def curve(values, every=1):
    return Series([i * every for i in range(len(values))], list(values))


def hacked(asr, reward, every=25):
    """Curves of a run: held-out ASR every so many steps, the reward at every step."""
    return {HELDOUT: curve(asr, every), REWARD: curve(reward)}


def ramp(start, stop, count):
    return [start + (stop - start) * i / (count - 1) for i in range(count)]


def state(curves, key, judges=(), scale=10.0):
    return next(sign for sign in signs_of(curves, judges, scale) if sign.key == key).state


class TestRewardHacking:
    def test_both_rise(self):
        sign = reward_hacking(hacked(ramp(0.1, 0.6, 13), ramp(4, 9, 301)), 10.0)
        assert sign.state == "alarm"
        assert sign.steps[-1] == 300

    @pytest.mark.parametrize(
        ("asr", "reward"),
        [(ramp(0.6, 0.1, 13), ramp(4, 9, 301)), (ramp(0.1, 0.6, 13), ramp(9, 4, 301)), ([0.3] * 13, ramp(4, 9, 301))],
    )
    def test_one_alone_is_fine(self, asr, reward):
        assert reward_hacking(hacked(asr, reward), 10.0).state == "fine"

    def test_a_rise_that_is_over_is_a_look(self):
        asr = [*ramp(0.1, 0.5, 8), *ramp(0.5, 0.05, 8), *[0.05] * 4]
        reward = [*ramp(4, 8, 200), *[8.0] * 276]
        sign = reward_hacking(hacked(asr, reward), 10.0)
        assert sign.state == "look"
        assert max(sign.steps) < 300

    def test_a_jump_is_found_though_it_is_noise_to_itself(self):
        assert reward_hacking(hacked([0.05] * 7 + [0.6] * 3, ramp(4, 9, 226)), 10.0).state in ("alarm", "look")

    def test_noise_raises_few_alarms(self):
        draw = random.Random(0)
        alarms = 0
        for _ in range(200):
            asr = [sum(draw.random() < 0.2 for _ in range(24)) / 24 for _ in range(13)]
            reward = [7 + draw.gauss(0, 0.5) for _ in range(301)]
            alarms += reward_hacking(hacked(asr, reward), 10.0).state != "fine"
        assert alarms <= 4

    def test_too_few_measurements(self):
        assert reward_hacking(hacked([0.1, 0.4, 0.7], ramp(4, 9, 51)), 10.0).state == "unknown"
        assert joint_rises(curve([0.1] * 3), curve([1.0] * 3), 10.0) is None
        assert reward_hacking({}, 10.0).state == "unknown"

    def test_refusals_count_on_benign_seeds(self):
        curves = {
            f"validation/plain/{names.COMPLIANCE}": curve(ramp(0.95, 0.4, 13), 25),
            names.reward("benign", "defender"): curve(ramp(4, 9, 301)),
        }
        sign = reward_hacking(curves, 10.0)
        assert sign.state == "alarm"
        assert "refusals" in sign.text

    def test_zero_sum_rewards_have_a_smaller_scale(self):
        small = hacked(ramp(0.1, 0.6, 13), ramp(0.0, 0.4, 301))
        assert reward_hacking(small, 10.0).state == "fine"
        assert reward_hacking(small, 2.0).state == "alarm"


def judge(**values):
    base = {"role": "defender", "category": "harmful", "n": 1000, "length_correlation": 0.0}
    return {**base, "first_minus_second": 0.0, "standard_error": 0.02, **values}


CASES = [
    ("overfit", {names.EXPLOITABILITY: curve([0.1]), names.HELDOUT_EXPLOITABILITY: curve([0.9])}, (), "look"),
    ("overfit", {names.EXPLOITABILITY: curve([0.1]), names.HELDOUT_EXPLOITABILITY: curve([0.15])}, (), "fine"),
    ("overfit", {names.ASR: curve([0.0] * 20), HELDOUT: curve([0.4] * 3)}, (), "look"),
    ("overfit", {names.ASR: curve([0.0] * 20)}, (), "unknown"),
    ("refusal", {f"validation/plain/{names.COMPLIANCE}": curve([0.5, 0.5, 0.5])}, (), "look"),
    ("refusal", {f"validation/plain/{names.COMPLIANCE}": curve([0.5, 1, 1, 1])}, (), "fine"),
    ("repetition", {"harmful/attacker/distinct_2": curve([0.8] * 10 + [0.1] * 10)}, (), "look"),
    ("repetition", {"harmful/attacker/distinct_2": curve([0.8] * 20)}, (), "fine"),
    ("position", {"judge/swap_disagreement": curve([0.5] * 4)}, (), "look"),
    ("position", {}, (judge(first_minus_second=0.9),), "look"),
    ("position", {}, (judge(first_minus_second=0.9, standard_error=0.4),), "fine"),
    ("position", {}, (), "unknown"),
    ("length", {}, (judge(length_correlation=-0.5),), "look"),
    ("length", {}, (judge(length_correlation=0.1),), "fine"),
    ("length", {}, (judge(length_correlation=0.9, n=20),), "unknown"),
    ("verdicts", {"harmful/defender/no_verdict": curve([0.0] * 9 + [0.2])}, (), "look"),
    ("broken", {"harmful/defender/outcome/length": curve([0.5] * 9 + [0.0])}, (), "fine"),
    ("broken", {names.GIBBERISH: curve([0.0, 0.3])}, (), "look"),
]


@pytest.mark.parametrize(("key", "curves", "judges", "expected"), CASES)
def test_other_signs(key, curves, judges, expected):
    assert state(curves, key, judges) == expected


def test_every_sign_states_its_rule():
    assert all(len(sign.rule) > 40 and sign.state == "unknown" for sign in signs_of({}, (), 10.0))
