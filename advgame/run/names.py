"""The metric names that the live view and the summary read; whoever logs one of these imports it from here.

Rewards, rates and text statistics of play are named `<category>/<role>/<what>` by `metrics.py`.
"""

STAGES = ("play", "learn", "publish", "validate")
"""Stages of a step, in order; the seconds spent in one are logged as `stage_seconds(stage)`."""

STEP_SECONDS = "seconds/step"
TREES_PER_SECOND = "play/trees_per_second"

ASR = "harmful/asr_judged"
COMPLIANCE = "benign/compliance_judged"

EVAL_PREFIX = "eval/"
"""What an evaluation measures, every so many steps."""

EXPLOITABILITY = "eval/exploitability"
EXPLOITABILITY_BOUND = "eval/exploitability_bound"
"""Exploitability if every ill-formed answer counted as a disclosure."""
HELDOUT_EXPLOITABILITY = "eval/heldout_exploitability"
OVER_REFUSAL = "eval/worst_over_refusal"
GIBBERISH = "eval/gibberish"
EVAL_ASR = "eval/asr"
EVAL_COMPLIANCE = "eval/benign_compliance"

COUNTER_PREFIX = "count/"
"""Failures, retries and missing verdicts, cumulative; the live view shows those that are not zero."""

ROLES = ("attacker", "defender")
CATEGORIES = ("harmful", "benign")


def stage_seconds(stage: str) -> str:
    return f"seconds/{stage}"


def first_token_seconds(player: str) -> str:
    """From the end of a step's learning to the first token sampled, in the next step, with the weights it made."""
    return f"seconds/first_token/{player}"


def reward(category: str, role: str) -> str:
    """The mean of all rewards that exist, failures (-1) included."""
    return f"{category}/{role}/reward"


def loss(role: str) -> str:
    return f"learn/{role}/loss"
