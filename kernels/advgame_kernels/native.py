"""Calls into the C++ extension `advgame_kernels._native`, which may not have been built.

The extension knows addresses, sizes and dtype codes, nothing of torch; this file turns tensors into those.
Contiguity, shapes and dtypes must have been checked by the caller.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from advgame_kernels import memory
from advgame_kernels.types import STATS_DTYPES, LogProbs

try:
    _native: Any = importlib.import_module("advgame_kernels._native")
    _why_not = ""
except ImportError as error:
    _native = None
    _why_not = str(error)

# Codes of csrc/dtypes.h.
CODES = {torch.float32: 0, torch.bfloat16: 1}


def available() -> bool:
    """Whether the extension was built and loads."""
    return _native is not None


def require() -> None:
    """Raise RuntimeError with the reason when the extension is not there."""
    if _native is None:
        raise RuntimeError(f"impl='native': the C++ extension is not available ({_why_not}); reinstall with a compiler")


def isa() -> str:
    """The instruction set that the extension uses here: 'avx512', 'avx2' or 'generic'."""
    require()
    return str(_native.isa())


# Defined by schema: the first call of a `torch.library.custom_op` imports all of torch._dynamo, seconds on a CPU.
_library = torch.library.Library("advgame_kernels", "FRAGMENT")
_library.define(
    "native_row_stats(Tensor logits, Tensor labels, float temperature, float softcap) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "native_row_grads_(Tensor(a!) out, Tensor? source, Tensor labels, Tensor entropy, Tensor lse, Tensor? d_logps, "
    "Tensor? d_entropy, Tensor? d_lse, float temperature, float softcap) -> ()"
)


@torch.library.impl(_library, "native_row_stats", "CPU")
def _row_stats(logits: Tensor, labels: Tensor, temperature: float, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocab = logits.shape
    logps, entropy, lse = (torch.empty(rows, dtype=dtype) for dtype in STATS_DTYPES)
    _native.row_stats(
        logits.data_ptr(), CODES[logits.dtype], rows, vocab, logits.stride(0), labels.data_ptr(), temperature, softcap,
        logps.data_ptr(), entropy.data_ptr(), lse.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return logps, entropy, lse


@torch.library.register_fake("advgame_kernels::native_row_stats", lib=_library)
def _(logits: Tensor, labels: Tensor, temperature: float, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    logps, entropy, lse = (logits.new_empty(logits.shape[0], dtype=dtype) for dtype in STATS_DTYPES)
    return logps, entropy, lse


def row_stats(logits: Tensor, labels: Tensor, temperature: float, softcap: float) -> LogProbs:
    """C++ twin of passes_torch.row_stats: float32 or bfloat16 logits on the CPU, unit stride in V."""
    return LogProbs(*torch.ops.advgame_kernels.native_row_stats(logits, labels, temperature, softcap))


@torch.library.impl(_library, "native_row_grads_", "CPU")
def _row_grads_(
    out: Tensor, source: Tensor | None, labels: Tensor, entropy: Tensor, lse: Tensor, d_logps: Tensor | None,
    d_entropy: Tensor | None, d_lse: Tensor | None, temperature: float, softcap: float,
) -> None:  # fmt: skip
    logits = out if source is None else source
    rows, vocab = logits.shape
    pointers = [0 if g is None else g.data_ptr() for g in (d_logps, d_entropy, d_lse)]
    _native.row_grads(
        logits.data_ptr(), CODES[logits.dtype], out.data_ptr(), CODES[out.dtype], rows, vocab, logits.stride(0),
        out.stride(0), labels.data_ptr(), temperature, softcap, entropy.data_ptr(), lse.data_ptr(),
        *pointers, torch.get_num_threads(),
    )  # fmt: skip


@torch.library.register_fake("advgame_kernels::native_row_grads_", lib=_library)
def _(*args: object, **kwargs: object) -> None:
    return None


def row_grads_(
    logits: Tensor,
    labels: Tensor,
    stats: LogProbs,
    d_logps: Tensor | None,
    d_entropy: Tensor | None,
    d_lse: Tensor | None,
    temperature: float,
    softcap: float,
    out_dtype: torch.dtype,
    room: Tensor | None = None,
) -> Tensor:
    """C++ twin of passes_torch.row_grads_, into `room` if there is one. A bfloat16 gradient of float32 logits always
    has memory of its own: torch's CPU matrix product of bfloat16 rows with gaps between them reads into the gaps.
    """
    if room is None and out_dtype == torch.bfloat16 and logits.dtype == torch.float32:
        room = memory.empty(tuple(logits.shape), out_dtype, logits.device)
    out, source = (logits, None) if room is None else (room, logits)
    torch.ops.advgame_kernels.native_row_grads_(
        out, source, labels, stats.entropy, stats.lse, d_logps, d_entropy, d_lse, temperature, softcap
    )
    return out if out.dtype == out_dtype else out.to(out_dtype)


def ema_update_(
    shadow: Sequence[Tensor],
    params: Sequence[Tensor],
    decay: float | Tensor,
    publish: Sequence[Tensor | None] | None,
    compensation: Sequence[Tensor] | None = None,
    seed: int | None = None,
) -> list[int]:
    """Update every tensor whose dtypes the extension knows; return the indices of the others."""
    table, rest = ema_table(shadow, params, publish, compensation)
    ema_run(table, 1.0 - float(decay), seed or 0)
    return rest


EmaTable = list[tuple[int, int, int, int, int, int, int, int]]


def ema_table(
    shadow: Sequence[Tensor],
    params: Sequence[Tensor],
    publish: Sequence[Tensor | None] | None,
    compensation: Sequence[Tensor] | None = None,
) -> tuple[EmaTable, list[int]]:
    """Addresses, dtype codes and sizes of what the extension can update; the indices of the others."""
    rest, table = [], []
    for i, (s, p) in enumerate(zip(shadow, params, strict=True)):
        out = None if publish is None else publish[i]
        if p.dtype not in CODES or (out is not None and out.dtype not in CODES):
            rest.append(i)
            continue
        target = (0, 0) if out is None else (out.data_ptr(), CODES[out.dtype])
        kept = 0 if compensation is None else compensation[i].data_ptr()
        table.append((s.data_ptr(), CODES[s.dtype], p.data_ptr(), CODES[p.dtype], *target, kept, s.numel()))
    return table, rest


def ema_run(table: EmaTable, step: float, seed: int = 0) -> None:
    """shadow += step · (param − shadow) for every row of `table`, whose tensors must still be alive.

    seed: of the rounding of bfloat16 shadows without compensation. The bits depend on it and on an element's place
    among all of the table, on nothing else.
    """
    _native.ema_update(table, step, seed % (1 << 64), torch.get_num_threads())


def byte_sums(tensors: Sequence[Tensor], out: Tensor) -> None:
    """C++ twin of sums.byte_sums_ref: contiguous tensors on the CPU, out (n,) int64."""
    entries = [(t.data_ptr(), t.numel() * t.element_size()) for t in tensors]
    _native.byte_sums(entries, out.data_ptr(), torch.get_num_threads())
