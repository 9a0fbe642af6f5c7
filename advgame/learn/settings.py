"""The settings of learning, which the config tree includes as `learn:`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from advgame.settings import Section

Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class LoraSettings(Section):
    """Low-rank adapters instead of all weights."""

    rank: PositiveInt = Field(16, description="Rank of an adapter.")
    alpha: PositiveFloat = Field(32.0, description="Scale: an adapter adds alpha / rank times B A to its weight.")
    targets: str | tuple[str, ...] = Field(
        "all-linear", description="Names of the adapted layers, a pattern, or all-linear (all but the LM head)."
    )


class DeepSpeedSettings(Section):
    """How DeepSpeed shards a player over the ranks that `torchrun` starts."""

    stage: Literal[0, 1, 2, 3] | None = Field(
        None,
        description="ZeRO stage: what is split over the ranks. 0 nothing, 1 moments, averages and fp32 masters, 2 also "
        "gradients, 3 also weights; null: that of the JSON file, else 2.",
    )
    config: Path | None = Field(
        None,
        description="DeepSpeed JSON; its batch, clipping and accumulation keys are auto or equal to these settings.",
    )
    attacker_ranks: PositiveInt | None = Field(
        None,
        description="So many ranks, the first ones, train the Attacker alone and all others the Defender, at the same "
        "time; null: all ranks train both, by turns.",
    )


class LearnSettings(Section):
    backend: Literal["plain", "deepspeed"] = Field(
        "plain", description="One process, or DeepSpeed on the ranks that torchrun starts (one: no torchrun needed)."
    )
    objective: Literal["dpo", "ipo", "grpo", "reinforce"] = Field(
        "dpo", description="dpo and ipo on pairs; grpo on groups; reinforce: REINFORCE++ (Self-RedTeam)."
    )
    beta: PositiveFloat = Field(0.1, description="Preference temperature, or weight of the KL penalty.")
    reference: Literal["auto", "rollout", "recompute", "initial"] = Field(
        "auto",
        description="Reference log-probs of pairs: the sampler's, recomputed from the EMA, measured then chosen "
        "(auto), or the frozen initial model's (initial; needs rollout.source: live).",
    )
    reference_tolerance: PositiveFloat = Field(0.02, description="auto keeps rollout up to this relative change.")
    lr: PositiveFloat = Field(1e-6, description="AdamW learning rate.")
    lr_final: Fraction = Field(0.2, description="Learning rate at the last step, as a fraction (cosine decay).")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="AdamW moment decays.")
    weight_decay: NonNegativeFloat = Field(0.1, description="AdamW decoupled weight decay.")
    clip_norm: PositiveFloat = Field(1.0, description="Gradient-norm clip of each update.")
    ema_decay: Decay = Field(0.95, description="Decay of the players' moving averages.")
    ema_schedule: Literal["constant", "warmup", "power"] = Field(
        "constant",
        description="Decay of average number t: ema_decay; at most (1+t)/(10+t); or (1-1/t)^(ema_gamma+1) (EDM2).",
    )
    ema_gamma: PositiveFloat = Field(6.94, description="power: exponent; 6.94 averages over about 10 % of the steps.")
    accumulate: bool = Field(False, description="One update a step over both categories; off: one each.")
    micro_tokens: PositiveInt = Field(
        16384,
        description="Most tokens of one packed forward and backward: bounds activation memory (a pair is not split).",
    )
    attention: Literal["auto", "sdpa", "flash", "flex"] = Field(
        "auto",
        description="Packed attention: torch's SDPA in buckets of like lengths, flash-attention 2 or 3, FlexAttention; "
        "auto: sdpa on a CPU, on a GPU flash where it is installed (bfloat16 only), else flex.",
    )
    share_prefixes: Literal["auto", "off"] = Field(
        "auto",
        description="Compute a prompt once for all completions of it in a micro-batch; auto falls back to a copy each, "
        "with a note, for models that fail the trial.",
    )
    checkpointing: bool = Field(
        False, description="Keep only each layer's input, compute the rest again in the backward pass: less memory."
    )
    compile: bool = Field(False, description="Run the decoder through torch.compile (attention stays as it is).")
    streams: Literal["auto", "off"] = Field(
        "off",
        description="auto: on a GPU both players learn at the same time, on a stream each, where memory for both is "
        "free (measured in the first two steps; never with DeepSpeed); off: by turns.",
    )
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="AdamW with fp32 moments, or with 8-bit ones (needs bitsandbytes and a GPU)."
    )
    lora: LoraSettings | None = Field(
        None,
        description="Train low-rank adapters (peft): average and reference are adapters, served is the merged model.",
    )
    schedule: Literal["joint", "sequential"] = Field("joint", description="Both players learn, or by turns.")
    round_steps: PositiveInt = Field(50, description="Steps of one player's turn (sequential; the Attacker begins).")
    nll_weight: NonNegativeFloat = Field(0.0, description="Weight of the chosen completion's token-mean NLL.")
    length_normalised: bool = Field(False, description="Mean instead of summed log-probs in the pair objective.")
    entropy_weight: NonNegativeFloat = Field(0.0, description="Weight of an entropy bonus.")
    baseline: Literal["across_seeds", "per_seed"] = Field("across_seeds", description="GRPO: whose mean is subtracted.")
    aggregate: Literal["group", "token"] = Field(
        "group", description="GRPO: sum tokens, mean over group, then groups; or one mean over tokens."
    )
    importance_weights: bool = Field(False, description="GRPO, on-policy: truncated weights live / sampler.")
    truncation: PositiveFloat = Field(2.0, description="Cap of those weights.")
    ppo_clip: PositiveFloat = Field(0.2, description="reinforce: PPO clipping of the ratio.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Compute type; master weights are fp32.")
    deepspeed: DeepSpeedSettings = Field(
        default_factory=DeepSpeedSettings, description="How DeepSpeed shards (backend: deepspeed)."
    )
