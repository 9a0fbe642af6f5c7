"""The pairwise losses on sequence log-probs: their names, their settings and their formulas.

Every formula works on u = logp_c − ref_c and v = logp_r − ref_r of a pair, h = u − v, and is written in torch;
autograd of this file is the reference for the gradient factors in the Triton kernel. Sources: DPO arXiv
2305.18290 (label smoothing: its note on conservative DPO; robust: 2403.00409), IPO 2310.12036 eq. 17, EXO
2402.00856 eq. 16, NCA 2402.05369, BCO 2404.04656 (pairwise form without the running mean), SPPO 2405.00675
(hard), APO 2408.06266 eqs. 7, 8, DiscoPOP 2406.08414 eq. 5, SimPO 2405.14734, ORPO 2403.07691, CPO 2401.08417.
Names mean what TRL 1.16 means by them, but for `ipo`, which is the paper's on sums of log-probs (TRL's mean form
is `ipo_mean`), and `sft`, which is the mean over the chosen tokens of each pair rather than of the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from advgame_kernels._checks import finite, non_negative, one_of, positive, refuse

KINDS = (
    "sigmoid", "ipo", "ipo_mean", "hinge", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
    "discopop", "simpo", "orpo", "cpo", "sft",
)  # fmt: skip
REFERENCE_FREE = frozenset({"simpo", "orpo", "cpo", "sft"})
ALWAYS_MEAN = frozenset({"ipo_mean", "simpo", "orpo"})
SMOOTHED = frozenset({"sigmoid", "exo_pair", "simpo", "cpo"})
# ORPO's odds p/(1-p) of a sequence that the model is certain of are infinite; log-probs stop just below zero.
ORPO_CEILING = -1e-6


@dataclass(frozen=True)
class PreferenceSpec:
    """Every setting of a preference loss, checked once. Raises ValueError naming the setting."""

    kind: str = "sigmoid"
    beta: float = 0.1
    average: bool = False
    label_smoothing: float = 0.0
    robust: bool = False
    simpo_gamma: float = 0.5
    discopop_tau: float = 0.05
    nll_weight: float = 0.0
    entropy_weight: float = 0.0

    def __post_init__(self) -> None:
        one_of("kind", self.kind, KINDS)
        positive("beta", self.beta)
        finite("label_smoothing", self.label_smoothing)
        if not 0.0 <= self.label_smoothing <= 0.5:
            refuse("label_smoothing", "a number in [0, 0.5]", self.label_smoothing)
        if self.label_smoothing > 0.0 and self.kind not in SMOOTHED:
            refuse("label_smoothing", f"0 for kind {self.kind!r}, which has none", self.label_smoothing)
        if self.kind == "exo_pair" and self.label_smoothing == 0.0:
            refuse("label_smoothing", "a number above 0 for kind 'exo_pair' (the paper takes 1e-3)", 0.0)
        if self.robust and (self.kind != "sigmoid" or self.label_smoothing >= 0.5):
            refuse("robust", "kind 'sigmoid' with label_smoothing below 0.5", f"{self.kind}, {self.label_smoothing}")
        finite("simpo_gamma", self.simpo_gamma)
        positive("discopop_tau", self.discopop_tau)
        non_negative("nll_weight", self.nll_weight)
        finite("entropy_weight", self.entropy_weight)

    @property
    def averages(self) -> bool:
        """Whether log-probs are divided by lengths before the loss sees them."""
        return self.average or self.kind in ALWAYS_MEAN

    @property
    def needs_reference(self) -> bool:
        """Whether the loss is undefined without reference log-probs."""
        return self.kind not in REFERENCE_FREE

    @property
    def needs_lengths(self) -> bool:
        """Whether the loss is undefined without token counts."""
        return self.averages or self.kind == "sft" or self.nll_weight != 0.0


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − exp(x)) for x < 0, by the branch that keeps its digits (Mächler 2012)."""
    near = x > -math.log(2.0)
    near_zero = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, near_zero, far)


def _smoothed_sigmoid(x: Tensor, smoothing: float) -> Tensor:
    loss = -F.logsigmoid(x) * (1.0 - smoothing)
    return loss - F.logsigmoid(-x) * smoothing if smoothing else loss


def pair_losses(
    logp: Tensor,  # (P, 2) chosen and rejected, in the units the spec asks for
    ref: Tensor | None,  # (P, 2) the same, or None
    chosen_mean: Tensor | None,  # (P,) mean log-prob of the chosen tokens; needed by sft only
    spec: PreferenceSpec,
) -> Tensor:  # (P,)
    """The kind's loss of every pair, without the NLL and entropy terms."""
    beta, kind, smoothing = spec.beta, spec.kind, spec.label_smoothing
    if kind == "sft":
        assert chosen_mean is not None
        return -chosen_mean
    if kind in REFERENCE_FREE or ref is None:
        u, v = logp.unbind(dim=1)
    else:
        u, v = (logp - ref).unbind(dim=1)
    h = u - v
    if kind == "sigmoid" and spec.robust:
        flipped = smoothing * F.logsigmoid(-beta * h)
        return (flipped - (1.0 - smoothing) * F.logsigmoid(beta * h)) / (1.0 - 2.0 * smoothing)
    if kind in ("sigmoid", "cpo"):
        return _smoothed_sigmoid(beta * h, smoothing)
    if kind == "simpo":
        return _smoothed_sigmoid(beta * h - spec.simpo_gamma, smoothing)
    if kind in ("ipo", "ipo_mean"):
        return (h - 0.5 / beta).square()
    if kind == "hinge":
        return torch.relu(1.0 - beta * h)
    if kind == "exo_pair":
        win, lose = F.logsigmoid(beta * h), F.logsigmoid(-beta * h)
        return win.exp() * (win - math.log1p(-smoothing)) + lose.exp() * (lose - math.log(smoothing))
    if kind == "nca_pair":
        return -F.logsigmoid(beta * u) - 0.5 * (F.logsigmoid(-beta * u) + F.logsigmoid(-beta * v))
    if kind == "bco_pair":
        return -F.logsigmoid(beta * u) - F.logsigmoid(-beta * v)
    if kind == "sppo_hard":
        return (u - 0.5 / beta).square() + (v + 0.5 / beta).square()
    if kind == "apo_zero":
        return torch.sigmoid(-beta * u) + torch.sigmoid(beta * v)
    if kind == "apo_down":
        return torch.sigmoid(beta * u) + torch.sigmoid(-beta * h)
    if kind == "discopop":
        x = beta * h
        mixed = -F.logsigmoid(x) * torch.sigmoid(-x / spec.discopop_tau)
        # exp(-x)·sigmoid(x/tau) as one exponential: the product of the two overflows times zero for x << 0.
        return mixed + torch.exp(F.logsigmoid(x / spec.discopop_tau) - x)
    assert kind == "orpo"
    u, v = u.clamp(max=ORPO_CEILING), v.clamp(max=ORPO_CEILING)
    return -beta * F.logsigmoid((u - v) - (log1mexp(u) - log1mexp(v)))
