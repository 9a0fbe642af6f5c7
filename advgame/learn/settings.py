"""The settings of adapters, validated where the config tree includes them as `learn.lora:`."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt

from advgame.rollout.settings import Section


class LoraSettings(Section):
    """Low-rank adapters instead of all weights."""

    rank: PositiveInt = Field(16, description="Rank of an adapter.")
    alpha: PositiveFloat = Field(32.0, description="Scale: an adapter adds alpha / rank times B A to its weight.")
    targets: str | tuple[str, ...] = Field(
        "all-linear", description="Names of the adapted layers, a pattern, or all-linear (all but the LM head)."
    )
