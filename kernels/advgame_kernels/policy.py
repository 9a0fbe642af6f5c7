"""Token-level policy losses (GRPO, PPO clipping, truncated importance weights) from log-probs that already exist."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from advgame_kernels import passes
from advgame_kernels._checks import describe, finite, floating, non_negative, positive, refuse, vector
from advgame_kernels._twins import twin_of
from advgame_kernels.preference import Factors, gradient_of
from advgame_kernels.types import PolicyOutput

Clip = float | tuple[float, float] | None


@dataclass(frozen=True)
class PolicySpec:
    """Every setting of a policy loss, checked once. Raises ValueError naming the setting."""

    kl_beta: float = 0.0
    clip: Clip = None  # epsilon, or (below, above)
    truncation: float | None = None
    entropy_weight: float = 0.0

    def __post_init__(self) -> None:
        non_negative("kl_beta", self.kl_beta)
        if self.clip is not None:
            sides = self.clip if isinstance(self.clip, tuple) else (self.clip, self.clip)
            numbers = len(sides) == 2 and all(isinstance(side, Real) for side in sides)
            if not (numbers and 0.0 < sides[0] <= 1.0 and 0.0 < sides[1] < math.inf):
                refuse("clip", "an epsilon in (0, 1], or (below, above) of such", self.clip)
        if self.truncation is not None:
            positive("truncation", self.truncation)
        finite("entropy_weight", self.entropy_weight)

    @property
    def clip_range(self) -> tuple[float, float]:
        """How far the ratio may fall below and rise above 1."""
        if isinstance(self.clip, tuple):
            return self.clip
        return (math.inf, math.inf) if self.clip is None else (self.clip, self.clip)


class PolicyInputs(NamedTuple):
    """The per-token inputs of a policy loss beside the log-probs, each (N,) float or None."""

    advantages: Tensor
    weights: Tensor
    ref_logps: Tensor | None
    old_logps: Tensor | None
    sampler_logps: Tensor | None

    def rows(self, rows: slice) -> PolicyInputs:
        """The same for some of the tokens."""
        ref, old, sampler = (None if x is None else x[rows] for x in self[2:])
        return PolicyInputs(self.advantages[rows], self.weights[rows], ref, old, sampler)


class TokenTerms(NamedTuple):
    """Per-token results, (N,) float64; zero where the weight is zero."""

    loss: Tensor
    kl: Tensor
    ratio: Tensor
    clipped: Tensor  # bool


def token_terms(logps: Tensor, inputs: PolicyInputs, spec: PolicySpec) -> TokenTerms:
    """The loss of every token in differentiable float64 torch: what the Triton kernel is held against.

    Tokens of weight zero are taken out before any exponential: whatever stands there (padding, an overflow, a
    NaN) must not reach the sum, nor its gradient.
    """
    live = inputs.weights != 0

    def safe(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.where(live, x.double(), 0.0)

    logp, advantage, weight = (torch.where(live, x.double(), 0.0) for x in (logps, inputs.advantages, inputs.weights))
    ref, old, sampler = safe(inputs.ref_logps), safe(inputs.old_logps), safe(inputs.sampler_logps)
    ratio = torch.exp(logp - (logp.detach() if old is None else old))
    objective = ratio * advantage
    clipped = torch.zeros_like(live)
    if spec.clip is not None:
        below, above = spec.clip_range
        bounded = ratio.clamp(1.0 - below, 1.0 + above) * advantage
        clipped = bounded < objective
        objective = torch.minimum(objective, bounded)
    shown = ratio.detach()
    if sampler is not None:
        importance = torch.exp((logp.detach() if old is None else old) - sampler)
        if old is None:
            shown = importance
        if spec.truncation is not None:
            clipped = clipped | (importance > spec.truncation)
            importance = importance.clamp(max=spec.truncation)
        objective = objective * importance
    kl = torch.zeros_like(logp)
    if ref is not None:
        kl = torch.expm1(ref - logp) - (ref - logp)
    loss = weight * (spec.kl_beta * kl - objective)
    return TokenTerms(loss, kl, shown, clipped & live)


class TokenFactors(NamedTuple):
    """Detached terms and the derivative of their summed loss with respect to each log-prob (None if not asked for)."""

    terms: TokenTerms
    d_logps: Tensor | None  # (N,)


def token_factors(
    logps: Tensor,  # (N,) detached
    inputs: PolicyInputs,
    spec: PolicySpec,
    want_grads: bool,
    impl: str,
) -> TokenFactors:
    """Terms and gradient factors: one Triton launch, or `token_terms` and its autograd."""
    if impl == "triton":
        from advgame_kernels import policy_triton

        found = policy_triton.token_terms(logps, inputs, spec, want_grads)
        return TokenFactors(found.terms, found.d_logps if want_grads else None)
    leaf = logps.double().detach()
    if not want_grads:
        return TokenFactors(token_terms(leaf, inputs, spec), None)
    factor, terms = gradient_of(lambda x: _summed(token_terms(x, inputs, spec)), leaf)
    return TokenFactors(TokenTerms(*(x.detach() for x in terms)), factor.to(logps.dtype))


def _summed(terms: TokenTerms) -> tuple[Tensor, TokenTerms]:
    return terms.loss.sum(), terms


def check_policy_inputs(inputs: PolicyInputs, rows: int, device: torch.device, spec: PolicySpec) -> None:
    """Refuse per-token inputs of the wrong shape, dtype or device, and settings without the input they act on."""
    for name, x in inputs._asdict().items():
        if x is not None:
            vector(name, x, rows, device)
        elif name in ("advantages", "weights"):
            refuse(name, f"a floating-point tensor of shape ({rows},)", describe(x))
    if spec.truncation is not None and inputs.sampler_logps is None:
        refuse("truncation", "None where sampler_logps is None", spec.truncation)
    if spec.kl_beta > 0.0 and inputs.ref_logps is None:
        refuse("ref_logps", "reference log-probs where kl_beta is above 0", None)


def finish(
    loss: Tensor, logps: Tensor, terms: TokenTerms, weights: Tensor, entropy: Tensor | None, dtype: torch.dtype
) -> PolicyOutput:
    """The public output from a loss that carries the gradient and terms that are detached here."""
    live = (weights != 0).sum().clamp(min=1)
    return PolicyOutput(
        loss=loss,
        logps=logps.detach(),
        kl=terms.kl.detach().to(dtype),
        ratio=terms.ratio.detach().to(dtype),
        clip_fraction=(terms.clipped.sum() / live).to(dtype),
        entropy=None if entropy is None else entropy.detach(),
    )


def policy_loss(
    logps: Tensor,  # (N,) token log-probs of the policy
    advantages: Tensor,  # (N,)
    weights: Tensor,  # (N,) 0 takes a token out, whatever its other inputs hold
    *,
    ref_logps: Tensor | None = None,  # (N,)
    old_logps: Tensor | None = None,  # (N,)
    sampler_logps: Tensor | None = None,  # (N,)
    kl_beta: float = 0.0,
    clip: Clip = None,
    truncation: float | None = None,
    impl: str = "auto",
) -> PolicyOutput:
    """sum_t weights_t · (−objective_t + kl_beta · kl_t), over tokens.

    objective = ratio · advantage with ratio = exp(logp − old_logps), and without `old_logps` exp(logp − sg logp),
    which is 1 with the gradient of logp (GRPO, arXiv 2402.03300). `clip`, an epsilon or (below, above), takes the
    minimum with the clipped ratio (PPO, 1707.06347). `sampler_logps` multiplies the objective by exp(old_logps −
    sampler), without `old_logps` exp(sg logp − sampler), at most `truncation`, detached (truncated importance
    sampling). kl = exp(ref − logp) − (ref − logp) − 1. Averages over tokens, groups or sequences are the caller's
    choice of `weights`. N may be 0.

    The output's `ratio` is the policy ratio with `old_logps`, else the untruncated importance weight with
    `sampler_logps`, else ones; kl, ratio are 0 and 1 where the weight is 0. Computed in float64, returned as
    float32 unless `logps` is float64. Raises ValueError for a wrong shape, dtype, device or setting.
    """
    spec = PolicySpec(kl_beta, clip, truncation)
    floating("logps", logps, 1)
    inputs = PolicyInputs(advantages, weights, ref_logps, old_logps, sampler_logps)
    check_policy_inputs(inputs, logps.shape[0], logps.device, spec)
    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
    if passes.choose(impl, torch.float32, logps.device) == "triton":
        result = token_factors(logps.detach().contiguous(), inputs, spec, logps.requires_grad, "triton")
        loss = result.terms.loss.sum().to(dtype)
        if result.d_logps is not None and torch.is_grad_enabled():
            loss = Factors.apply(loss, logps, result.d_logps)
        return finish(loss, logps.to(dtype), result.terms, weights, None, dtype)
    terms = token_terms(logps, inputs, spec)
    return finish(terms.loss.sum().to(dtype), logps.to(dtype), terms, weights, None, dtype)


@twin_of(policy_loss)
def policy_loss_ref(
    logps: Tensor,  # (N,)
    advantages: Tensor,  # (N,)
    weights: Tensor,  # (N,)
    **settings: Any,
) -> PolicyOutput:
    """`policy_loss` in differentiable torch whatever the device; `impl` is ignored."""
    return policy_loss(logps, advantages, weights, **(settings | {"impl": "torch"}))
