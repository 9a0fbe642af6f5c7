"""The settings of the tiny world, validated where the config tree includes them as `world:`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from advgame.settings import Section


class WorldSettings(Section):
    """Decides the world's own randomness and how its players are made before the game starts."""

    level: Literal["easy", "hard"] = Field(
        "easy",
        description="Share of the untrained Attacker's rewrites that hold a strong framing: most, or 4 %.",
    )
    seed: int = Field(
        0,
        ge=0,
        description="The world's randomness: the Defender's soft spots, initial weights, warm-start data.",
    )
    reasoning: bool = Field(True, description="The Attacker reasons in <think> first; follows game.reasoning.")
    warm_steps: PositiveInt = Field(900, description="Supervised steps that make each player.")
    warm_batch: PositiveInt = Field(64, description="Examples of each supervised step (of each role, if shared).")
    warm_lr: PositiveFloat = Field(8e-3, description="Peak learning rate of the warm start.")
    hidden: PositiveInt = Field(64, multiple_of=32, description="Width of the players (heads are 32 wide).")
    layers: PositiveInt = Field(2, description="Layers of the players.")
    judge_steps: PositiveInt = Field(1800, description="Supervised steps that make the world's own llm judge.")
    judge_batch: PositiveInt = Field(32, description="Questions of each of those steps.")
