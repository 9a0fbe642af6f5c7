"""Sequence sums, pairwise loss and the gradient factor of every token in one Triton launch, one program a pair.

Everything is float64: a margin is a small difference of two sums of thousands of log-probs, and a few thousand
additions cost nothing beside a logits GEMM. Formulas: preference_kinds.py, whose autograd the factors here are
tested against.
"""

# Triton kernels carry no annotations but constexpr.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from advgame_kernels.preference import SequenceTerms
from advgame_kernels.preference_kinds import KINDS, ORPO_CEILING, REFERENCE_FREE, PreferenceSpec

BLOCK = 512
WARPS = 4
CODES = {kind: tl.constexpr(i) for i, kind in enumerate(KINDS)}
SIGMOID, IPO, IPO_MEAN, HINGE, EXO, NCA, BCO, SPPO, APO_ZERO, APO_DOWN, DISCOPOP, SIMPO, ORPO, CPO, SFT = CODES.values()


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _log_odds(x):
    """x − log(1 − e^x) for x < 0: the log-odds of a probability given as its logarithm."""
    return x - tl.log(1.0 - tl.exp(x))


@triton.jit
def _pair(u, v, beta, smoothing, gamma, tau, ceiling, KIND: tl.constexpr, ROBUST: tl.constexpr):
    """Loss of a pair and its derivatives with respect to u and v; for sft all zero, its loss is the NLL alone."""
    h = u - v
    x = beta * h
    loss = h * 0.0
    du = h * 0.0
    dv = h * 0.0
    if (KIND == SIGMOID) | (KIND == CPO) | (KIND == SIMPO):
        if KIND == SIMPO:
            x -= gamma
        sign = 1.0
        whole = 1.0
        if ROBUST:
            sign = -1.0
            whole = 1.0 - 2.0 * smoothing
        loss = (-(1.0 - smoothing) * _log_sigmoid(x) - sign * smoothing * _log_sigmoid(-x)) / whole
        du = beta * (sign * smoothing * _sigmoid(x) - (1.0 - smoothing) * _sigmoid(-x)) / whole
        dv = -du
    elif (KIND == IPO) | (KIND == IPO_MEAN):
        gap = h - 0.5 / beta
        loss = gap * gap
        du = 2.0 * gap
        dv = -du
    elif KIND == HINGE:
        loss = tl.maximum(1.0 - x, 0.0)
        du = tl.where(x < 1.0, -beta, 0.0)
        dv = -du
    elif KIND == EXO:
        q = _sigmoid(x)
        tilt = tl.log(smoothing) - tl.log(1.0 - smoothing)
        loss = q * (_log_sigmoid(x) - tl.log(1.0 - smoothing)) + _sigmoid(-x) * (_log_sigmoid(-x) - tl.log(smoothing))
        du = beta * q * _sigmoid(-x) * (x + tilt)
        dv = -du
    elif KIND == NCA:
        loss = -_log_sigmoid(beta * u) - 0.5 * (_log_sigmoid(-beta * u) + _log_sigmoid(-beta * v))
        du = beta * (0.5 * _sigmoid(beta * u) - _sigmoid(-beta * u))
        dv = beta * 0.5 * _sigmoid(beta * v)
    elif KIND == BCO:
        loss = -_log_sigmoid(beta * u) - _log_sigmoid(-beta * v)
        du = -beta * _sigmoid(-beta * u)
        dv = beta * _sigmoid(beta * v)
    elif KIND == SPPO:
        win = u - 0.5 / beta
        lose = v + 0.5 / beta
        loss = win * win + lose * lose
        du = 2.0 * win
        dv = 2.0 * lose
    elif KIND == APO_ZERO:
        loss = _sigmoid(-beta * u) + _sigmoid(beta * v)
        du = -beta * _sigmoid(beta * u) * _sigmoid(-beta * u)
        dv = beta * _sigmoid(beta * v) * _sigmoid(-beta * v)
    elif KIND == APO_DOWN:
        loss = _sigmoid(beta * u) + _sigmoid(-x)
        slope = beta * _sigmoid(x) * _sigmoid(-x)
        du = beta * _sigmoid(beta * u) * _sigmoid(-beta * u) - slope
        dv = slope
    elif KIND == DISCOPOP:
        share = _sigmoid(-x / tau)
        boost = tl.exp(_log_sigmoid(x / tau) - x)
        loss = boost - _log_sigmoid(x) * share
        mixed = _log_sigmoid(x) * share * _sigmoid(x / tau) / tau - _sigmoid(-x) * share
        du = beta * (mixed + boost * (share / tau - 1.0))
        dv = -du
    elif KIND == ORPO:
        a = tl.minimum(u, ceiling)
        b = tl.minimum(v, ceiling)
        odds = _log_odds(a) - _log_odds(b)
        loss = -beta * _log_sigmoid(odds)
        pull = beta * _sigmoid(-odds)
        du = tl.where(u <= ceiling, -pull / (1.0 - tl.exp(a)), 0.0)
        dv = tl.where(v <= ceiling, pull / (1.0 - tl.exp(b)), 0.0)
    return loss, du, dv


@triton.jit
def _total(values, start, stop, BLOCK: tl.constexpr):
    """Sum of values[start:stop] in float64, always in the same order."""
    lanes = tl.zeros([BLOCK], tl.float64)
    for first in range(start, stop, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        lanes += tl.load(values + offsets, mask=offsets < stop, other=0.0).to(tl.float64)
    return tl.sum(lanes, axis=0)


@triton.jit
def _fill(values, value, start, stop, BLOCK: tl.constexpr):
    for first in range(start, stop, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        tl.store(values + offsets, tl.full([BLOCK], 0.0, tl.float64) + value, mask=offsets < stop)


@triton.jit(do_not_specialize=["first_row"])  # it changes every chunk
def pair_kernel(
    logps,  # (n,) tokens of the chunk
    entropy,  # (n,) read if HAS_ENTROPY
    bounds,  # (2p + 1,) int64, of the whole batch
    counts,  # (2p,) int64 tokens of each sequence
    ref,  # (2p,) read if HAS_REF
    scale,  # (1,) float64: 1 / normalizer
    terms,  # (p, 8) float64 out: loss, loss + NLL term, logp c, r, logratio c, r, mean entropy c, r
    d_logps,  # (n,) out if GRADS
    d_entropy,  # (n,) out if GRADS and ENTROPY_TERM
    first_row,  # row of `bounds` at which the chunk's tokens start
    beta,
    smoothing,
    gamma,
    tau,
    ceiling,
    nll_weight,
    entropy_weight,
    KIND: tl.constexpr,
    ROBUST: tl.constexpr,
    AVERAGE: tl.constexpr,
    USES_REF: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    ENTROPY_TERM: tl.constexpr,
    GRADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One pair: sums, loss, and the gradient of (loss · scale) with respect to every token's log-prob and entropy."""
    pair = tl.program_id(0)
    start = tl.load(bounds + 2 * pair) - first_row
    middle = tl.load(bounds + 2 * pair + 1) - first_row
    stop = tl.load(bounds + 2 * pair + 2) - first_row
    count_c = tl.maximum(tl.load(counts + 2 * pair), 1).to(tl.float64)
    count_r = tl.maximum(tl.load(counts + 2 * pair + 1), 1).to(tl.float64)
    sum_c = _total(logps, start, middle, BLOCK)
    sum_r = _total(logps, middle, stop, BLOCK)
    per_c = 1.0 + 0.0 * count_c
    per_r = 1.0 + 0.0 * count_r
    if AVERAGE:
        per_c = 1.0 / count_c
        per_r = 1.0 / count_r
    logp_c = sum_c * per_c
    logp_r = sum_r * per_r
    ratio_c = logp_c
    ratio_r = logp_r
    if HAS_REF:
        ratio_c -= tl.load(ref + 2 * pair).to(tl.float64) * per_c
        ratio_r -= tl.load(ref + 2 * pair + 1).to(tl.float64) * per_r
    u = logp_c
    v = logp_r
    if USES_REF:
        u = ratio_c
        v = ratio_r
    loss, du, dv = _pair(u, v, beta, smoothing, gamma, tau, ceiling, KIND, ROBUST)
    mean_c = sum_c / count_c
    if KIND == SFT:
        loss = -mean_c
    total = loss - nll_weight * mean_c
    out = terms + pair * 8
    if HAS_ENTROPY:
        entropy_c = _total(entropy, start, middle, BLOCK) / count_c
        entropy_r = _total(entropy, middle, stop, BLOCK) / count_r
        tl.store(out + 6, entropy_c)
        tl.store(out + 7, entropy_r)
    tl.store(out, loss)
    tl.store(out + 1, total)
    tl.store(out + 2, logp_c)
    tl.store(out + 3, logp_r)
    tl.store(out + 4, ratio_c)
    tl.store(out + 5, ratio_r)
    if GRADS:
        by = tl.load(scale)
        factor_c = du * per_c - nll_weight / count_c
        if KIND == SFT:
            factor_c -= 1.0 / count_c
        _fill(d_logps, factor_c * by, start, middle, BLOCK)
        _fill(d_logps, dv * per_r * by, middle, stop, BLOCK)
        if ENTROPY_TERM:
            _fill(d_entropy, -0.5 * entropy_weight * by / count_c, start, middle, BLOCK)
            _fill(d_entropy, -0.5 * entropy_weight * by / count_r, middle, stop, BLOCK)


class PairTerms(NamedTuple):
    """What the launch gives; the two factor vectors have no elements where they were not asked for."""

    terms: Tensor  # (p, 8) float64, see pair_kernel
    d_logps: Tensor  # (n,)
    d_entropy: Tensor  # (n,)


def as_sequence_terms(found: PairTerms) -> SequenceTerms:
    """The launch's table in the form that preference.assemble takes; `total` leaves the entropy term out."""
    terms = found.terms
    return SequenceTerms(terms[:, 1].sum(), terms[:, 0], terms[:, 2:4].flatten(), terms[:, 4:6])


@torch.library.custom_op("advgame_kernels::pair_terms", mutates_args=())
def _pair_terms(
    logps: Tensor, entropy: Tensor | None, bounds: Tensor, counts: Tensor, ref: Tensor | None, scale: Tensor,
    first_row: int, settings: list[float], kind: int, robust: bool, average: bool, grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    terms, d_logps, d_entropy = _outputs(logps, counts, settings, grads)
    if counts.shape[0]:
        pair_kernel[(counts.shape[0] // 2,)](
            logps, logps if entropy is None else entropy, bounds, counts, logps if ref is None else ref, scale, terms,
            d_logps, d_entropy, first_row, *settings, KIND=kind, ROBUST=robust, AVERAGE=average,
            USES_REF=ref is not None and KINDS[kind] not in REFERENCE_FREE, HAS_REF=ref is not None,
            HAS_ENTROPY=entropy is not None, ENTROPY_TERM=settings[-1] != 0.0, GRADS=grads,
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return terms, d_logps, d_entropy


@_pair_terms.register_fake
def _(logps, entropy, bounds, counts, ref, scale, first_row, settings, kind, robust, average, grads):  # type: ignore[no-untyped-def]
    return _outputs(logps, counts, settings, grads)


def _outputs(logps: Tensor, counts: Tensor, settings: list[float], grads: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows = logps.shape[0]
    return (
        logps.new_zeros((counts.shape[0] // 2, 8), dtype=torch.float64),
        logps.new_empty(rows if grads else 0),
        logps.new_empty(rows if grads and settings[-1] != 0.0 else 0),
    )


def pair_terms(
    logps: Tensor,  # (n,) float32 or float64
    entropy: Tensor | None,  # (n,)
    bounds: Tensor,  # (2p + 1,) int64 on the device
    counts: Tensor,  # (2p,) int64 on the device
    ref: Tensor | None,  # (2p,)
    scale: Tensor,  # (1,) float64 on the device
    first_row: int,
    spec: PreferenceSpec,
    grads: bool,
) -> PairTerms:
    """Triton twin of linear_preference's sums, preference.sequence_terms and their autograd, in one launch."""
    settings = [
        spec.beta, spec.label_smoothing, spec.simpo_gamma, spec.discopop_tau, ORPO_CEILING, spec.nll_weight,
        spec.entropy_weight,
    ]  # fmt: skip
    return PairTerms(
        *_pair_terms(
            logps, entropy, bounds, counts, ref, scale, first_row, settings, KINDS.index(spec.kind), spec.robust,
            spec.averages, grads,
        )
    )  # fmt: skip
