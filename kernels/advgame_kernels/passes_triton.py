"""The two passes over a chunk of logits as Triton kernels: one program a row, one trip through memory each.

Speed of light on a chunk of n rows: the statistics read n·V logits once; the gradient reads and writes them once.
Half- precision gradients of float32 logits go to the front half of each row's own memory, so they cost half a
write and no allocation. There is no autotuning: the second kernel destroys its input and could not be run twice.
Formulas and notation: passes_torch.py. float32, bfloat16 and float16 logits; float64 stays with torch.
"""

# Triton kernels carry no annotations but constexpr.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from advgame_kernels._launch import device_of
from advgame_kernels.types import STATS_DTYPES

BLOCK = 4096
WARPS = 8


@triton.jit
def _transform(z, temperature, inv_temperature, softcap, SOFTCAP: tl.constexpr):
    """x of the raw logits, and softcap's tanh (unused otherwise)."""
    t = z
    if SOFTCAP:
        # tanh(y) = 2·sigmoid(2y) − 1 neither overflows nor needs libdevice; near 0 its series
        y = z / softcap
        s = y * y
        series = y + y * s * (-0.33333333 + s * (0.13333333 + s * (-0.053968254 + s * 0.021869488)))
        t = tl.where(s < 0.0625, series, 2.0 * tl.sigmoid(2.0 * y) - 1.0)
        z = t * softcap
    x = z * inv_temperature
    # what the rounding of 1/T has left of z: two instructions in place of a division
    rest = tl.fma(-x, temperature, z) * inv_temperature
    return tl.where(tl.abs(x) < float("inf"), x + rest, x), t


# Slices of per-row arrays start anywhere: compiling a kernel for each combination of alignments would stall training.
@triton.jit(do_not_specialize_on_alignment=["labels", "logps", "entropy", "lse"])
def row_stats_kernel(
    logits,  # (n, V), row stride `stride`
    labels,  # (n,) int64
    logps,  # (n,) float32 out
    entropy,  # (n,) float32 out
    lse,  # (n,) float64 out
    vocab,
    stride,
    temperature,
    inv_temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Running maximum per row; exponential sums per lane, merged once at the end of the row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    peak = float("-inf")
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < vocab
        z = tl.load(logits + offsets, mask=inside, other=float("-inf")).to(tl.float32)
        x, _ = _transform(z, temperature, inv_temperature, softcap, SOFTCAP)
        x = tl.where(inside, x, float("-inf"))  # softcap would make the missing columns finite
        top = tl.maximum(peak, tl.max(x, axis=0))
        base = tl.where(top == float("-inf"), 0.0, top)
        shift = tl.where(peak == float("-inf"), 0.0, peak - base)
        fall = tl.where(peak == float("-inf"), 0.0, tl.exp(shift))
        x -= base
        e = tl.exp(x)
        weighted = fall * (weighted + shift * total) + tl.where(e > 0.0, e * x, 0.0)
        total = fall * total + e
        peak = top
    mass = tl.sum(total, axis=0)
    log_mass = tl.log(mass)
    label = tl.load(labels + row)
    x_label, _ = _transform(tl.load(logits + label).to(tl.float32), temperature, inv_temperature, softcap, SOFTCAP)
    tl.store(logps + row, (x_label - peak) - log_mass)
    tl.store(entropy + row, log_mass - tl.sum(weighted, axis=0) / mass)
    tl.store(lse + row, tl.cast(peak, tl.float64) + tl.cast(log_mass, tl.float64))


@triton.jit(do_not_specialize_on_alignment=["labels", "entropy", "lse", "d_logps", "d_entropy", "d_lse"])
def row_grads_kernel(
    logits,  # (n, V), row stride `stride`
    grads,  # the same memory, as elements of the gradient's dtype, row stride `grad_stride`
    labels,  # (n,) int64
    entropy,  # (n,) float32
    lse,  # (n,) float64
    d_logps,  # (n,) float32, read if HAS_LOGPS
    d_entropy,  # (n,) float32, read if HAS_ENTROPY
    d_lse,  # (n,) float32, read if HAS_LSE
    vocab,
    stride,
    grad_stride,
    temperature,
    inv_temperature,
    softcap,
    HAS_LOGPS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_LSE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrite a row with its gradient, front to back."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    grads += row * grad_stride
    label = tl.load(labels + row)
    exact_lse = tl.load(lse + row)
    row_lse = exact_lse.to(tl.float32)
    rest = (exact_lse - row_lse.to(tl.float64)).to(tl.float32)
    rest = tl.where(row_lse == float("-inf"), 0.0, rest)
    a = 0.0
    c = 0.0
    if HAS_LOGPS:
        a = tl.load(d_logps + row)
    if HAS_LSE:
        c = tl.load(d_lse + row)
    if HAS_ENTROPY:
        b = tl.load(d_entropy + row)
        row_entropy = tl.load(entropy + row)
    for start in range(0, vocab, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < vocab
        z = tl.load(logits + offsets, mask=inside, other=float("-inf")).to(tl.float32)
        x, t = _transform(z, temperature, inv_temperature, softcap, SOFTCAP)
        logp = (x - row_lse) - rest
        p = tl.exp(logp)
        g = p * (c - a)
        if HAS_ENTROPY:
            g -= tl.where(p > 0.0, p * b * (logp + row_entropy), 0.0)
        if HAS_LOGPS:
            g += tl.where(offsets == label, a, 0.0)
        g *= inv_temperature
        if SOFTCAP:
            g *= 1.0 - t * t
        if NARROW:
            # The first block's gradient lands on logits that other threads of this program may still have to read.
            tl.debug_barrier()
        tl.store(grads + offsets, g.to(grads.dtype.element_ty), mask=inside)


def _block(vocab: int) -> int:
    return min(BLOCK, triton.next_power_of_2(vocab))


@torch.library.custom_op("advgame_kernels::row_stats", mutates_args=())
def _row_stats(logits: Tensor, labels: Tensor, temperature: float, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocab = logits.shape
    out = tuple(torch.empty(rows, dtype=dtype, device=logits.device) for dtype in STATS_DTYPES)
    if rows:
        with device_of(logits):
            row_stats_kernel[(rows,)](
                logits, labels, *out, vocab, logits.stride(0), temperature, 1.0 / temperature, softcap,
                SOFTCAP=softcap > 0.0, BLOCK=_block(vocab), num_warps=WARPS,
            )  # fmt: skip
    return out[0], out[1], out[2]


@_row_stats.register_fake
def _(logits: Tensor, labels: Tensor, temperature: float, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(logits.new_empty(logits.shape[0], dtype=dtype) for dtype in STATS_DTYPES)  # type: ignore[return-value]


@torch.library.custom_op("advgame_kernels::row_grads_", mutates_args=("logits",))
def _row_grads_(
    logits: Tensor,
    labels: Tensor,
    entropy: Tensor,
    lse: Tensor,
    d_logps: Tensor | None,
    d_entropy: Tensor | None,
    d_lse: Tensor | None,
    temperature: float,
    softcap: float,
    narrow: torch.dtype | None,
) -> None:
    rows, vocab = logits.shape
    if rows == 0:
        return
    grads = logits if narrow is None else _front(logits, narrow)
    with device_of(logits):
        row_grads_kernel[(rows,)](
            logits, grads, labels, entropy, lse, *(entropy if d is None else d for d in (d_logps, d_entropy, d_lse)),
            vocab, logits.stride(0), grads.stride(0), temperature, 1.0 / temperature, softcap,
            HAS_LOGPS=d_logps is not None, HAS_ENTROPY=d_entropy is not None, HAS_LSE=d_lse is not None,
            SOFTCAP=softcap > 0.0, NARROW=narrow is not None, BLOCK=_block(vocab), num_warps=WARPS,
        )  # fmt: skip


@_row_grads_.register_fake
def _(*args: object, **kwargs: object) -> None:
    return None


def _front(logits: Tensor, narrow: torch.dtype) -> Tensor:  # (n, V) float32 -> (n, V) narrow, same storage
    """The first half of every row's memory, seen as V elements of a two-byte dtype."""
    return logits.view(narrow)[:, : logits.shape[1]]


def row_stats(
    logits: Tensor,  # (n, V) float32, bfloat16 or float16; unit stride in V
    labels: Tensor,  # (n,) int64
    temperature: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # logps, entropy, lse, each (n,)
    """Triton twin of passes_torch.row_stats."""
    return _row_stats(logits, labels, temperature, softcap)


def row_grads_(
    logits: Tensor,  # (n, V), overwritten
    labels: Tensor,  # (n,)
    entropy: Tensor,  # (n,) float32
    lse: Tensor,  # (n,) float64
    d_logps: Tensor | None,  # (n,) float32
    d_entropy: Tensor | None,  # (n,) float32
    d_lse: Tensor | None,  # (n,) float32
    temperature: float,
    softcap: float,
    out_dtype: torch.dtype,
) -> Tensor:  # (n, V) out_dtype in the memory of `logits`; rows keep the logits' stride in bytes
    """Triton twin of passes_torch.row_grads_."""
    narrow = out_dtype if out_dtype.itemsize < logits.dtype.itemsize else None
    _row_grads_(logits, labels, entropy, lse, d_logps, d_entropy, d_lse, temperature, softcap, narrow)
    if narrow is not None:
        return _front(logits, narrow)
    return logits if out_dtype == logits.dtype else logits.to(out_dtype)
