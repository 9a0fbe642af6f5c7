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


# By schema, as native.py does and for its reason.
_library = torch.library.Library("advgame_kernels", "FRAGMENT")
_library.define("huge_pages_(Tensor(a!) x) -> ()")


@torch.library.impl(_library, "huge_pages_", "CPU")
def _huge_pages_(x: Tensor) -> None:
    advise = _madvise()
    if advise is not None:
        start = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        advise(start, x.data_ptr() + x.nbytes - start, mmap.MADV_HUGEPAGE)  # a hint: a refusal changes nothing


@torch.library.register_fake("advgame_kernels::huge_pages_", lib=_library)
def _(x: Tensor) -> None:
    return None


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty, backed by huge pages if it is large and on the CPU."""
    out = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and out.nbytes >= LEAST:
        torch.ops.advgame_kernels.huge_pages_(out)
    return out
