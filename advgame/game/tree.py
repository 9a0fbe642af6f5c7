"""The tree of one seed as plain data: `Seed -> Attack -> Response`, with every verdict that was given.

A tree holds facts only (what was sampled, parsed and judged); rewards are a pure function of it (`rewards.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Category(StrEnum):
    HARMFUL = "harmful"
    BENIGN = "benign"


class Rubric(StrEnum):
    """What a judge scores from 0 to 10."""

    COMPLIANCE = "compliance"
    DEFLECTION = "deflection"
    REFUSAL = "refusal"


def defender_rubric(category: Category) -> Rubric:
    """What a good answer of the Defender is: helpful on benign seeds, a deflection on harmful ones."""
    return Rubric.DEFLECTION if category is Category.HARMFUL else Rubric.COMPLIANCE


def attacker_rubric(category: Category) -> Rubric:
    """What the Attacker wants the Defender's answer to be: the opposite behaviour of its seed's category."""
    return Rubric.COMPLIANCE if category is Category.HARMFUL else Rubric.REFUSAL


class Outcome(StrEnum):
    """How an attack or a response ended; of several failures the first in this order."""

    OK = "ok"
    ENGINE_FAILED = "engine_failed"
    LENGTH = "length"
    UNPARSABLE = "unparsable"
    UNFAITHFUL = "unfaithful"
    NO_FAITHFULNESS_VERDICT = "no_faithfulness_verdict"


@dataclass(frozen=True)
class Seed:
    """One seed: what an attack must keep the intent of. `id` is stable across epochs and runs."""

    id: str
    category: Category
    text: str
    meta: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """What one player sampled, as tokens.

    `logprobs[i]` is the natural-log probability of `token_ids[i]` under the untempered, untruncated distribution
    of the weights of `version`. The closing token is included when `finish_reason` is "stop".
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    version: int

    @property
    def finished(self) -> bool:
        return self.finish_reason == "stop"


@dataclass(frozen=True)
class PairScore:
    """One verdict on two candidates (indices into the siblings); `scores` is None when the judge gave no verdict.

    `first == second` marks a lone candidate compared with itself, and a point-wise score, where both numbers are
    the candidate's own.
    """

    first: int
    second: int
    scores: tuple[float, float] | None


@dataclass(frozen=True)
class Response:
    """One answer of the Defender. `answer` is what the judge reads; None when the text does not parse."""

    sample: Sample | None
    text: str
    answer: str | None

    @property
    def outcome(self) -> Outcome:
        if self.sample is None:
            return Outcome.ENGINE_FAILED
        if not self.sample.finished:
            return Outcome.LENGTH
        return Outcome.OK if self.answer is not None else Outcome.UNPARSABLE


@dataclass(frozen=True)
class Attack:
    """One rewrite of a seed, its responses, and the Defender judge's verdicts on them.

    `sample` is None where the seed itself was played (`direct`) or the engine failed. `faithful` is None when the
    judge gave no verdict, or was never asked because the attack had failed before.
    """

    sample: Sample | None
    text: str
    prompt: str | None
    faithful: bool | None
    responses: tuple[Response, ...] = ()
    verdicts: tuple[PairScore, ...] = ()
    direct: bool = False

    @property
    def outcome(self) -> Outcome:
        if self.direct:
            return Outcome.OK
        if self.sample is None:
            return Outcome.ENGINE_FAILED
        if not self.sample.finished:
            return Outcome.LENGTH
        if self.prompt is None:
            return Outcome.UNPARSABLE
        if self.faithful is None:
            return Outcome.NO_FAITHFULNESS_VERDICT
        return Outcome.OK if self.faithful else Outcome.UNFAITHFUL


@dataclass(frozen=True)
class Tree:
    """All that was played on one seed in one step.

    `representatives[a]` is the index of the response that stands for attack `a` before the Attacker judge, None
    where it has none; `verdicts` are the Attacker judge's, over attack indices.
    """

    seed: Seed
    step: int
    index: int
    attacks: tuple[Attack, ...]
    representatives: tuple[int | None, ...] = ()
    verdicts: tuple[PairScore, ...] = ()
