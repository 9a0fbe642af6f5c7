"""The settings of the rules and of the judge, which the config tree includes as `game:` and `judge:`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from advgame.rollout.settings import EndpointSettings, SamplingSettings
from advgame.settings import Section


class JudgeSampling(SamplingSettings):
    max_tokens: PositiveInt = Field(8192, description="Longest completion, closing token included.")


class JudgeSettings(Section):
    kind: Literal["rule", "llm", "phrases"] = Field(
        "llm",
        description="rule: the world's exact judge; llm: a language model; phrases: refusal phrases, smoke tests only.",
    )
    model: Path | None = Field(
        None, description="Model folder of an llm judge; null with a world: its own small judge, taught by the rule."
    )
    engine: Literal["transformers", "vllm", "endpoint"] | None = Field(
        None, description="Who samples an llm judge; null: as rollout.engine, or the endpoint if one is given."
    )
    endpoint: EndpointSettings | None = Field(None, description="A server that judges instead of a model folder.")
    mode: Literal["pairwise", "pointwise"] = Field("pairwise", description="Score answers in pairs, or each alone.")
    samples: PositiveInt = Field(1, description="Verdicts sampled per question (llm).")
    swap: bool = Field(False, description="Ask each pair in both orders and average (llm).")
    style: Literal["reason", "brief", "verdict"] = Field(
        "reason",
        description="An llm judge reasons first; brief: in two sentences at the most; verdict: not at all.",
    )
    stop_at_verdict: bool | None = Field(
        None,
        description="End a completion at its verdict's closing tag, so that its first verdict counts (llm); "
        "null: unless style is reason, where the last one counts.",
    )
    noise: NonNegativeFloat = Field(0.0, description="Standard deviation added to each score (rule).")
    bias: NonNegativeFloat = Field(0.0, description="Strength of position and length bias (rule).")
    sampling: JudgeSampling = Field(default_factory=JudgeSampling, description="How an llm judge samples.")


class GameSettings(Section):
    attacks: PositiveInt = Field(2, description="A: attacks sampled per seed.")
    responses: PositiveInt = Field(2, description="D: responses sampled per attack.")
    faithfulness: bool = Field(True, description="Ask whether an attack keeps its seed's intent.")
    attacker_judge: bool = Field(True, description="Judge attacks; off: every valid attack gets 0.")
    optimistic: bool = Field(True, description="The best-scored response represents an attack; off: the first valid.")
    reasoning: bool = Field(True, description="The Attacker reasons in <think> before its prompt.")
    defender_reasoning: bool = Field(False, description="The Defender reasons in <think> before its answer.")
    condition_on: Literal["prompt", "seed"] = Field("prompt", description="What the Defender judge reads as the query.")
    skip_attacker: bool = Field(False, description="Seeds go to the Defender as they are; no Attacker plays.")
    self_play: bool = Field(False, description="Self-RedTeam: one shared model in both roles, zero-sum rewards.")
    templates: Path | None = Field(None, description="Folder of templates that replace ours, by file name.")
