"""Token objective, KL, clipping and the gradient factor of every token in one Triton launch.

float64 inside, as in policy.token_terms, whose autograd the factors here are tested against. Tokens of weight
zero come out as zeros whatever their other inputs hold.
"""

# Triton kernels carry no annotations but constexpr.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from advgame_kernels._launch import device_of
from advgame_kernels.policy import PolicyInputs, PolicySpec, TokenTerms

BLOCK = 256
WARPS = 4


@triton.jit
def _read(values, offsets, live):
    return tl.load(values + offsets, mask=live, other=0.0).to(tl.float64)


# Chunks start anywhere in the batch: one kernel for all alignments, rather than one for each combination.
@triton.jit(
    do_not_specialize=["count"],
    do_not_specialize_on_alignment=["logps", "advantages", "weights", "ref", "old", "sampler", "terms", "d_logps"],
)
def token_kernel(
    logps,  # (n,)
    advantages,  # (n,)
    weights,  # (n,)
    ref,  # (n,) read if HAS_REF
    old,  # (n,) read if HAS_OLD
    sampler,  # (n,) read if HAS_SAMPLER
    terms,  # (4, n) float64 out: loss, kl, ratio, clipped
    d_logps,  # (n,) out if GRADS
    count,
    kl_beta,
    low,  # bounds of the ratio, read if CLIP
    high,
    truncation,  # read if TRUNCATE
    HAS_REF: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_SAMPLER: tl.constexpr,
    CLIP: tl.constexpr,
    TRUNCATE: tl.constexpr,
    GRADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of tokens."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    weight = tl.load(weights + offsets, mask=inside, other=0.0).to(tl.float64)
    live = inside & (weight != 0.0)
    logp = _read(logps, offsets, live)
    advantage = _read(advantages, offsets, live)
    ratio = tl.full([BLOCK], 1.0, tl.float64)
    start = logp  # what the importance weight is taken of
    if HAS_OLD:
        start = _read(old, offsets, live)
        ratio = tl.exp(logp - start)
    objective = ratio * advantage
    slope = objective  # d objective / d logp: the ratio is its own derivative
    clipped = ratio * 0.0
    if CLIP:
        bounded = tl.minimum(tl.maximum(ratio, low), high) * advantage
        clipped = tl.where(bounded < objective, 1.0, 0.0)
        slope = tl.where(bounded < objective, 0.0, slope)
        objective = tl.minimum(objective, bounded)
    shown = ratio
    if HAS_SAMPLER:
        importance = tl.exp(start - _read(sampler, offsets, live))
        if not HAS_OLD:
            shown = importance
        if TRUNCATE:
            clipped = tl.where(importance > truncation, 1.0, clipped)
            importance = tl.minimum(importance, truncation)
        objective *= importance
        slope *= importance
    kl = ratio * 0.0
    kl_slope = ratio * 0.0
    if HAS_REF:
        gap = _read(ref, offsets, live) - logp
        kl = tl.exp(gap) - gap - 1.0
        kl_slope = 1.0 - tl.exp(gap)
    tl.store(terms + offsets, tl.where(live, weight * (kl_beta * kl - objective), 0.0), mask=inside)
    tl.store(terms + count + offsets, kl, mask=inside)
    tl.store(terms + 2 * count + offsets, shown, mask=inside)
    tl.store(terms + 3 * count + offsets, tl.where(live, clipped, 0.0), mask=inside)
    if GRADS:
        factor = tl.where(live, weight * (kl_beta * kl_slope - slope), 0.0)
        tl.store(d_logps + offsets, factor, mask=inside)


@torch.library.custom_op("advgame_kernels::token_terms", mutates_args=())
def _token_terms(
    logps: Tensor, advantages: Tensor, weights: Tensor, ref: Tensor | None, old: Tensor | None, sampler: Tensor | None,
    kl_beta: float, low: float, high: float, truncation: float, clip: bool, truncate: bool, grads: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n = logps.shape[0]
    terms, d_logps = _outputs(logps, grads)
    if n:
        with device_of(logps):
            token_kernel[(triton.cdiv(n, BLOCK),)](
                logps, advantages, weights, *(logps if x is None else x for x in (ref, old, sampler)), terms,
                d_logps, n, kl_beta, low, high, truncation, HAS_REF=ref is not None, HAS_OLD=old is not None,
                HAS_SAMPLER=sampler is not None, CLIP=clip, TRUNCATE=truncate, GRADS=grads, BLOCK=BLOCK,
                num_warps=WARPS,
            )  # fmt: skip
    return terms, d_logps


@_token_terms.register_fake
def _(
    logps: Tensor, advantages: Tensor, weights: Tensor, ref: Tensor | None, old: Tensor | None, sampler: Tensor | None,
    kl_beta: float, low: float, high: float, truncation: float, clip: bool, truncate: bool, grads: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _outputs(logps, grads)


def _outputs(logps: Tensor, grads: bool) -> tuple[Tensor, Tensor]:
    n = logps.shape[0]
    return logps.new_empty((4, n), dtype=torch.float64), logps.new_empty(n if grads else 0)


class TokenResult(NamedTuple):
    """Detached terms and the derivative of their summed loss; the latter has no elements where it was not asked for."""

    terms: TokenTerms
    d_logps: Tensor  # (n,)


def token_terms(
    logps: Tensor,  # (n,) contiguous
    inputs: PolicyInputs,  # (n,) each, contiguous
    spec: PolicySpec,
    grads: bool,
) -> TokenResult:
    """Triton twin of policy.token_terms and its autograd."""
    below, above = spec.clip_range
    found, d_logps = _token_terms(
        logps, *(None if x is None else x.contiguous() for x in inputs), spec.kl_beta, 1.0 - below, 1.0 + above,
        math.inf if spec.truncation is None else spec.truncation, spec.clip is not None, spec.truncation is not None,
        grads,
    )  # fmt: skip
    loss, kl, ratio, clipped = found.unbind(0)
    return TokenResult(TokenTerms(loss, kl, ratio, clipped != 0), d_logps)
