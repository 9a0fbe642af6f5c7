"""Large uninitialised tensors, on the CPU in huge pages where Linux grants them.

A call makes a chunk of logits and a float32 weight gradient of hundreds of megabytes afresh; with 4 KiB pages the
kernel's page faults take longer than the pass that fills them.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

LEAST = 8 << 20  # bytes; smaller blocks come from the allocator's own reserves


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


@torch.library.custom_op("advgame_kernels::huge_pages_", mutates_args=("x",))
def _huge_pages_(x: Tensor) -> None:
    advise = _madvise()
    if advise is not None:
        start = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        advise(start, x.data_ptr() + x.nbytes - start, mmap.MADV_HUGEPAGE)  # a hint: a refusal changes nothing


@_huge_pages_.register_fake
def _(x: Tensor) -> None:
    return None


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty, backed by huge pages if it is large and on the CPU."""
    out = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and out.nbytes >= LEAST:
        _huge_pages_(out)
    return out
