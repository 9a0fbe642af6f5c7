"""Memory shared by trainer and engine: anonymous, so that nothing is left behind whoever dies, and torch views of it.

The file has no name in any file system (memfd): the engine opens it through the trainer's entry in /proc, maps it, and
from then on each side's mapping keeps it alive. There is no window in which a crash could leak it.
"""

from __future__ import annotations

import mmap
import os
import warnings
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advgame.errors import InputError
from advgame.publish.plan import Plan

HUGE = 8 << 20
"""Bytes from which on shared memory asks for huge pages."""


class Arena:
    """`size` bytes of zeros, shared. `path` is where a child of this process (same user) opens it, until `close`."""

    def __init__(self, size: int, field: str = "rollout.vllm.transport"):
        """Raises InputError naming `field` if this machine has not that much memory free, or has no memfd."""
        if not hasattr(os, "memfd_create"):
            raise InputError(f"{field}: shm needs Linux (memfd); set loader")
        free = free_bytes()
        if size > free:
            raise InputError(
                f"{field}: shm needs {size / 2**30:.2f} GiB of shared memory, {free / 2**30:.2f} GiB are free; "
                "free memory, or use a smaller model or rollout.dtype: bfloat16"
            )
        self.size = size
        self._fd: int | None = os.memfd_create("advgame-weights", os.MFD_CLOEXEC)
        os.truncate(self._fd, max(size, mmap.PAGESIZE))
        self.bytes = mapped(f"/proc/self/fd/{self._fd}", size)

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def close(self) -> None:
        """No one can map it any more; the memory goes when the last view of either side does."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class SharedMemory:
    """One arena for all ranks of an engine on this machine, made when their plans are known."""

    def __init__(self, field: str = "rollout.vllm.transport"):
        self._field = field
        self._arena: Arena | None = None
        self.parts: list[Tensor] = []

    def grant(self, plans: Sequence[Plan], _devices: Sequence[str]) -> list[dict[str, Any]]:
        """Where each rank finds its part, as plain data. Raises InputError: not enough memory."""
        sizes = [plan.layout()[1] for plan in plans]
        starts = [sum(sizes[:rank]) for rank in range(len(sizes))]
        self.close()
        self._arena = Arena(sum(sizes), self._field)
        self.parts = [self._arena.bytes[a : a + n] for a, n in zip(starts, sizes, strict=True)]
        path = self._arena.path
        return [{"kind": "shm", "path": path, "start": a, "size": n} for a, n in zip(starts, sizes, strict=True)]

    def settled(self) -> None:
        """Every rank has mapped it: nobody else can any more."""
        if self._arena is not None:
            self._arena.close()

    def close(self) -> None:
        self.parts = []
        if self._arena is not None:
            self._arena.close()
            self._arena = None


def mapped(path: str, size: int) -> Tensor:
    """A writable uint8 tensor over a shared file; it holds the mapping. OSError or ValueError: not there, too small."""
    with open(path, "r+b") as file:
        have = os.fstat(file.fileno()).st_size
        if have < size:
            raise ValueError(f"the shared file has {have} bytes, the plan needs {size}")
        memory = mmap.mmap(file.fileno(), max(size, mmap.PAGESIZE))
    if size >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a hint: fewer entries of page tables for those who write and read all of it
            memory.madvise(mmap.MADV_HUGEPAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.frombuffer(memory, dtype=torch.uint8)[: max(size, 1)]


def flat_view(arena: Tensor, offset: int, elements: int, dtype: torch.dtype) -> Tensor:
    """`elements` of `dtype`, from byte `offset` of the arena."""
    return arena[offset : offset + elements * dtype.itemsize].view(dtype)


def checksum(tensor: Tensor) -> int:
    """Of a tensor's bytes, in the order of its elements: crc32 on the CPU, `device_checksum` elsewhere."""
    data: Any = tensor.detach().contiguous().flatten().view(torch.uint8)
    return zlib.crc32(data.numpy()) if data.device.type == "cpu" else device_checksum(data)


def device_checksum(data: Tensor) -> int:
    """Sum of bytes (uint8), each times an odd number that belongs to its place, modulo 2^64: nothing leaves the device.

    A change of one byte always shows; so do places that were swapped, unless their numbers agree modulo 2^16.
    """
    total = 0
    for start in range(0, data.numel(), 1 << 24):
        part = data[start : start + (1 << 24)].to(torch.int64)
        places = torch.arange(start, start + part.numel(), device=part.device)
        # 40503 is 2^16 over the golden ratio: neighbours get far numbers
        total += int((part * ((places * 40503 & 0xFFFF) * 2 + 1)).sum())
    return total & (2**64 - 1)


def free_bytes() -> int:
    """Memory that can still be had: the machine's, or what this control group may still take."""
    machine = next(
        int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line
    )
    try:
        most = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return machine if most == "max" else min(machine, int(most) - used)
    except (OSError, ValueError):
        return machine
