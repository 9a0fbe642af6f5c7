"""Large uninitialised tensors: on the CPU in memory that earlier ones have left, in huge pages where Linux grants them.

A call makes a chunk of logits and a float32 weight gradient of hundreds of megabytes. Fresh pages are cleared by the
kernel before they are written, which costs more than the passes that fill them, and many times more in a virtual
machine whose host has taken the free ones back. So a block that nobody holds any longer waits here for the next
tensor of its size. Waiting, it is the kernel's to take when memory runs short (MADV_FREE), and all that is lent and
waiting together is never more than what was lent at one time. `release()` gives back what waits.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import deque

import torch
from torch import Tensor

LEAST = 8 << 20  # bytes; smaller tensors come from torch's allocator
HUGE = 2 << 20  # bytes of a huge page
SLACK = 4  # a tensor may sit in a block so many times its size: what it does not touch was not touched for it
# As Linux names them; where one is missing, blocks are torch's own.
ADVICE = tuple(getattr(mmap, name, None) for name in ("MADV_HUGEPAGE", "MADV_FREE"))


class Pool:
    """Anonymous memory, lent as tensors. A tensor's end, in whatever thread that is, brings its block back."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.idle: list[mmap.mmap] = []  # oldest first
        self.returned: deque[mmap.mmap] = deque()  # finalisers may run while the lock is held: they only append here
        self.lent = 0  # bytes
        self.most = 0  # bytes lent at one time, at most

    def take(self, size: int) -> memoryview:
        """`size` writable bytes of any content."""
        rounded = -(-size // HUGE) * HUGE
        with self.lock:
            self._collect()
            fitting = [block for block in self.idle if rounded <= len(block) <= SLACK * rounded]
            block = min(fitting, key=len, default=None)
            if block is None:
                block = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                _advise(block, ADVICE[0])
            else:
                self.idle.remove(block)
            self.lent += len(block)
            self.most = max(self.most, self.lent)
            while self.idle and self.lent + sum(map(len, self.idle)) > self.most:
                self.idle.pop(0)
        loan = memoryview(block)[:size]
        weakref.finalize(loan, self._come_back, block).atexit = False
        return loan

    def _come_back(self, block: mmap.mmap) -> None:
        _advise(block, ADVICE[1])
        self.returned.append(block)

    def _collect(self) -> None:
        while self.returned:
            block = self.returned.popleft()
            self.lent -= len(block)
            self.idle.append(block)

    def release(self) -> None:
        """Give back to the system what waits, and forget how much was lent."""
        with self.lock:
            self._collect()
            self.idle.clear()
            self.most = self.lent


def _advise(block: mmap.mmap, advice: int | None) -> None:
    try:
        if advice is not None:
            block.madvise(advice)
    except OSError:
        pass  # a hint: a refusal changes nothing


_pool = Pool()
release = _pool.release

# By schema, as native.py does and for its reason.
_library = torch.library.Library("advgame_kernels", "FRAGMENT")
_library.define("empty(SymInt[] shape, ScalarType dtype) -> Tensor")


@torch.library.impl(_library, "empty", "CompositeExplicitAutograd")
def _empty(shape: list[int], dtype: torch.dtype) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.frombuffer(_pool.take(count * dtype.itemsize), dtype=dtype, count=count).view(shape)


@torch.library.register_fake("advgame_kernels::empty", lib=_library)
def _(shape: list[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty; on the CPU, if it is large, from the pool."""
    large = torch.Size(shape).numel() * dtype.itemsize >= LEAST
    if device.type == "cpu" and large and None not in ADVICE:
        out: Tensor = torch.ops.advgame_kernels.empty(list(shape), dtype)
        return out
    return torch.empty(shape, dtype=dtype, device=device)
