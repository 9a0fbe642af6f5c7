"""Chooses who makes the two passes over a chunk of logits: Triton on CUDA, C++ on the CPU, torch anywhere."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from advgame_kernels import memory, native, passes_torch
from advgame_kernels._checks import one_of
from advgame_kernels.types import LogProbs

IMPLS = ("auto", "torch", "native", "triton")


@functools.cache
def triton_reason() -> str | None:
    """Why Triton cannot be used here, or None. Triton is imported when it is first needed: CPU torch comes without."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton is not installed ({error})"
    return None


def choose(impl: str, logits_dtype: torch.dtype, device: torch.device) -> str:
    """The implementation that `impl` means for logits of this dtype on this device.

    Raises ValueError for an unknown name, RuntimeError when the one asked for cannot serve this call.
    """
    one_of("impl", impl, IMPLS)
    small = logits_dtype in (torch.float32, torch.bfloat16)
    if impl == "auto":
        if device.type == "cpu" and small and native.available():
            return "native"
        if device.type == "cuda" and logits_dtype != torch.float64 and triton_reason() is None:
            return "triton"
        return "torch"
    if impl == "triton":
        reason = triton_reason()
        if reason is None and logits_dtype == torch.float64:
            reason = "it computes in float32, not float64"
        if reason is None and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            reason = f"it serves CUDA tensors, not {device}, unless TRITON_INTERPRET=1"
        if reason is not None:
            raise RuntimeError(f"impl='triton': {reason}")
    if impl == "native":
        if device.type != "cpu" or not small:
            raise RuntimeError(f"impl='native' serves float32 and bfloat16 on the CPU, not {logits_dtype} on {device}")
        native.require()
    return impl


def row_stats(
    logits: Tensor,  # (N, V), unit stride in V
    labels: Tensor,  # (N,) int64
    temperature: float,
    softcap: float,
    impl: str,  # as `choose` gave it
) -> LogProbs:
    """One read of the logits; see passes_torch.row_stats for the formulas."""
    if impl == "native":
        return native.row_stats(logits, labels, temperature, softcap)
    if impl == "triton":
        from advgame_kernels import passes_triton

        return LogProbs(*passes_triton.row_stats(logits, labels, temperature, softcap))
    return passes_torch.row_stats(logits, labels, temperature, softcap)


def row_grads_(
    logits: Tensor,  # (N, V), overwritten
    labels: Tensor,  # (N,)
    stats: LogProbs,
    d_logps: Tensor | None,  # (N,)
    d_entropy: Tensor | None,  # (N,)
    d_lse: Tensor | None,  # (N,)
    temperature: float,
    softcap: float,
    out_dtype: torch.dtype,
    impl: str,
    room: Tensor | None = None,  # (N, V) out_dtype: taken by C++ instead of the memory of `logits`
) -> Tensor:  # (N, V) out_dtype, usually in the memory of `logits`
    """One read and one write; see passes_torch.row_grads_ for the formula. The contents of `logits` are lost."""
    if impl == "native":
        return native.row_grads_(
            logits, labels, stats, d_logps, d_entropy, d_lse, temperature, softcap, out_dtype, room
        )
    if impl == "triton":
        from advgame_kernels import passes_triton

        return passes_triton.row_grads_(
            logits, labels, stats.entropy, stats.lse, d_logps, d_entropy, d_lse, temperature, softcap, out_dtype
        )
    return passes_torch.row_grads_(logits, labels, stats, d_logps, d_entropy, d_lse, temperature, softcap, out_dtype)


def beside(logits: Tensor, impl: str) -> tuple[Tensor, Tensor | None]:
    """What `row_grads_` gets as its logits and its `room` where they are to be kept: C++ needs no copy of them."""
    if impl == "native":
        return logits, memory.empty(tuple(logits.shape), logits.dtype, logits.device)
    return logits.clone(), None
