"""The variants of the game, one set of overrides each, and what was published about some of them."""

from __future__ import annotations

from dataclasses import dataclass

BASE = "dpo-md"


@dataclass(frozen=True)
class Variant:
    """`words` are overrides of the tiny world's config, as on the command line."""

    name: str
    title: str
    words: tuple[str, ...] = ()


def _variant(name: str, title: str, words: str = "") -> Variant:
    return Variant(name, title, tuple(words.split()))


VARIANTS = (
    _variant(BASE, "DPO-MD, the default"),
    _variant("ipo-md", "IPO-MD", "--learn.objective ipo"),
    _variant("grpo", "GRPO, off-policy from the EMA", "--learn.objective grpo --game.attacks 4 --game.responses 4"),
    _variant(
        "grpo-on-policy", "GRPO, on-policy with truncated importance weights",
        "--learn.objective grpo --game.attacks 4 --game.responses 4 --rollout.source live "
        "--learn.importance_weights true",
    ),
    _variant("no-ema", "on-policy, initial model as reference", "--rollout.source live --learn.reference initial"),
    _variant("pointwise", "point-wise judge", "--judge.mode pointwise"),
    _variant("fixed-attacker", "fixed Attacker", "--attacker.frozen true"),
    _variant("fixed-defender", "fixed Defender", "--defender.frozen true"),
    _variant("sequential", "sequential rounds of 50 steps", "--learn.schedule sequential --learn.round_steps 50"),
    _variant("no-faithfulness", "no faithfulness judge", "--game.faithfulness false"),
    _variant("no-attacker-judge", "no Attacker judge", "--game.attacker_judge false"),
    _variant("first-valid", "non-optimistic Attacker", "--game.optimistic false"),
    _variant("no-reasoning", "Attacker without reasoning", "--game.reasoning false"),
    _variant("biased-judge", "noisy judge biased to position and length", "--judge.noise 2 --judge.bias 2"),
    _variant("biased-pointwise", "the same judge, point-wise", "--judge.noise 2 --judge.bias 2 --judge.mode pointwise"),
    _variant("direct-seeds", "Defender alone on plain seeds", "--game.skip_attacker true"),
    _variant(
        "self-redteam", "Self-RedTeam: one model, zero-sum, REINFORCE++",
        "--game.self_play true --learn.objective reinforce --rollout.source live",
    ),
)  # fmt: skip
"""In the table's order; the tiny world's rule judge stands for "another judge model" with noise and bias."""


def _sweep(field: str, label: str, values: tuple[str, ...], words: str) -> tuple[Variant, ...]:
    return tuple(_variant(f"{field}-{value}", f"{label} {value}", words.replace("VALUE", value)) for value in values)


SWEEPS = (
    *_sweep("lr", "both learning rates", ("3e-5", "3e-4", "1e-3"), "--attacker.lr VALUE --defender.lr VALUE"),
    *_sweep("decay", "EMA decay", ("0.0", "0.8", "0.99"), "--learn.ema_decay VALUE"),
    *_sweep("noise", "judge noise", ("1", "4"), "--judge.noise VALUE"),
    *_sweep("bias", "judge bias", ("1", "4"), "--judge.bias VALUE"),
)
"""Beyond the paper: one setting at a time, around the default."""


@dataclass(frozen=True)
class Claim:
    """A published direction: `better` ends below `worse` in `measure` (lower is better)."""

    text: str
    better: str
    worse: str
    measure: str


CLAIMS = (
    Claim("pairwise judge beats point-wise", BASE, "pointwise", "harm"),
    Claim("pairwise beats point-wise when the judge is noisy and biased", "biased-judge", "biased-pointwise", "harm"),
    Claim("moving average beats none", BASE, "no-ema", "harm"),
    Claim("trained Attacker beats fixed", BASE, "fixed-attacker", "harm"),
    Claim("honest judge beats a small or biased one", BASE, "biased-judge", "harm"),
    Claim("DPO is more stable than GRPO", BASE, "grpo", "swing"),
    Claim("IPO is more stable than GRPO", "ipo-md", "grpo", "swing"),
    Claim("the game beats Self-RedTeam", BASE, "self-redteam", "harm"),
)  # fmt: skip
"""Measures: see `results.MEASURES`. None of the settings above was chosen to agree with these."""


def by_name(name: str) -> Variant:
    """KeyError for an unknown name."""
    return {variant.name: variant for variant in (*VARIANTS, *SWEEPS)}[name]
