"""The metric names that the live view and the summary read; whoever logs one of these imports it from here.

Rewards, rates and text statistics of play are named `<category>/<role>/<what>` by `metrics.py`.
"""

STAGES = ("play", "learn", "publish", "validate")
"""Stages of a step, in order; the seconds spent in one are logged as `stage_seconds(stage)`."""

STEP_SECONDS = "seconds/step"
HIDDEN_SECONDS = "seconds/hidden"
"""What overlap hid: the seconds of play, learning and publishing beyond the wall time they took together."""

TREES_PER_SECOND = "play/trees_per_second"
"""Trees that ended in the step over the seconds in which trees were in flight."""
TREES_PER_HOUR = "play/trees_per_hour"
"""Trees learned from over the whole step, evaluation left out."""
JUDGE_SHARE = "play/judge_share"
"""The judge's part of the engine-seconds of all roles."""
STALENESS = "play/staleness"
"""Mean number of publishes between a sample of a learning player and the step that learns from it."""
LATE_TREES = "play/late_trees"
"""Trees of earlier steps among those learned from."""

ENERGY_PREFIX = "energy/"
"""What a step used, as far as this machine's counters can be read; processor seconds always."""
PROCESS_SECONDS = "energy/process_cpu_s"
PROCESS_MEMORY = "energy/process_memory_gib"
"""Resident memory of the trainer's process."""
EVALUATION_SECONDS, EVALUATION_JOULES = "energy/evaluation_cpu_s", "energy/evaluation_j"
"""Of a step's processor seconds and joules, those of the evaluation before it."""
ENERGY_SUMS = ("_joules", "/joules", "/co2e_g", "/process_cpu_s")
"""How the names of those end that add up over steps."""

REPLICA_PREFIX = "replica/"
"""What each replica of an engine did in a step, and how fast."""

TIMED = ("seconds/", "publish/", REPLICA_PREFIX, ENERGY_PREFIX, TREES_PER_SECOND, TREES_PER_HOUR, JUDGE_SHARE)
"""How the names begin that depend on the clock: equal runs differ in these and in no others."""

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
JUDGE_AGREEMENT = "eval/judge_agreement_"
"""A language-model judge's examination by the world's rule, at the start; see `world/agreement.py`."""
EVAL_COMPLIANCE = "eval/benign_compliance"

COUNTER_PREFIX = "count/"
"""Failures, retries and missing verdicts, cumulative; the live view shows those that are not zero."""

TRAINER_RESTARTS = "trainer_restarts"
"""Counter: how often the run went on from a checkpoint with new trainer ranks."""

ROLES = ("attacker", "defender")
CATEGORIES = ("harmful", "benign")

LABELS = {
    "exploitability": "exploitability ↓",
    "exploitability_bound": "… with all gibberish counted ↓",
    "heldout_exploitability": "held-out exploitability ↓",
    "worst_over_refusal": "worst over-refusal ↓",
    "asr": "sampled ASR ↓",
    "benign_compliance": "benign compliance ↑",
    "gibberish": "gibberish ↓",
}
"""What summary tables, the picture and the report call a measure of `summary.json`, and which way is better."""


def stage_seconds(stage: str) -> str:
    return f"seconds/{stage}"


def first_token_seconds(player: str) -> str:
    """From the end of a step's learning to the first token sampled, in the next step, with the weights it made."""
    return f"seconds/first_token/{player}"


def engine_seconds(role: str) -> str:
    """Seconds with at least one request of this role (attacker, defender, judge) in flight."""
    return f"seconds/engine/{role}"


def request_seconds(role: str) -> str:
    """Seconds of all requests of this role, added up."""
    return f"seconds/requests/{role}"


def replica_requests(name: str, replica: int) -> str:
    """Completions that one replica of an engine made since the step before, evaluation included."""
    return f"{REPLICA_PREFIX}{name}/{replica}/requests"


def replica_slowness(name: str, replica: int) -> str:
    """How many times as slow as the fastest replica this one is taken for, and by how much less it is asked."""
    return f"{REPLICA_PREFIX}{name}/{replica}/slowness"


def reward(category: str, role: str) -> str:
    """The mean of all rewards that exist, failures (-1) included."""
    return f"{category}/{role}/reward"


def loss(role: str) -> str:
    return f"learn/{role}/loss"
