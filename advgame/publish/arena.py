"""Memory shared by trainer and engine: anonymous, so that nothing is left behind whoever dies, and torch views of it.

The file has no name in any file system (memfd): the engine opens it through the trainer's entry in /proc, maps it, and
from then on each side's mapping keeps it alive. There is no window in which a crash could leak it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from advgame_kernels import byte_sums
from torch import Tensor

from advgame.errors import InputError
from advgame.publish import host
from advgame.publish.plan import Plan


class Arena:
    """`size` bytes of zeros, shared. `path` is where a child of this process (same user) opens it, until `close`."""

    def __init__(self, size: int):
        """Raises InputError if this machine has not that much memory free, or our extension was not built."""
        check_free(size, "shm")
        self.size = size
        try:
            self._memory = host.require("shm").SharedMemory(max(size, 1))
        except OSError as error:
            raise InputError(f"{host.FIELD}: shm gets no shared memory: {error.strerror}; set loader") from error
        self.bytes = torch.frombuffer(self._memory, dtype=torch.uint8)

    @property
    def path(self) -> str:
        return path_of(self._memory.descriptor)

    def close(self) -> None:
        """No one can map it any more; the memory goes when the last view of either side does."""
        self._memory.close_file()


class SharedMemory:
    """One arena for all ranks of an engine on this machine, made when their plans are known."""

    def __init__(self) -> None:
        self._arena: Arena | None = None
        self.parts: list[Tensor] = []

    def grant(self, plans: Sequence[Plan], _devices: Sequence[str]) -> list[dict[str, Any]]:
        """Where each rank finds its part, as plain data. Raises InputError: not enough memory."""
        sizes = [plan.layout()[1] for plan in plans]
        starts = [sum(sizes[:rank]) for rank in range(len(sizes))]
        self.close()
        self._arena = Arena(sum(sizes))
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


def path_of(descriptor: int) -> str:
    """Where a child of this process (same user) opens a file that this one has open."""
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def mapped(path: str, size: int) -> Tensor:
    """A writable uint8 tensor over a shared file; it holds the mapping. OSError or ValueError: not there, too small."""
    return torch.frombuffer(host.require("shm").SharedMemory(path, max(size, 1)), dtype=torch.uint8)


def flat_view(arena: Tensor, offset: int, elements: int, dtype: torch.dtype) -> Tensor:
    """`elements` of `dtype`, from byte `offset` of the arena."""
    return arena[offset : offset + elements * dtype.itemsize].view(dtype)


def checksum(tensor: Tensor) -> int:
    """Of a tensor's bytes, in the order of its elements; the same wherever it lies."""
    return checksums({"": tensor})[""]


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Of each tensor by name, on one device: one launch, one read (`advgame_kernels.byte_sums`)."""
    sums = byte_sums([tensor.detach().contiguous() for tensor in tensors.values()])
    return dict(zip(tensors, unsigned(sums), strict=True))


def unsigned(sums: Tensor) -> list[int]:
    """Plain numbers of 64 bits."""
    return [n & (2**64 - 1) for n in sums.tolist()]


def check_free(size: int, transport: str) -> None:
    """InputError if this machine has not `size` bytes of memory free: the kernel gives more away than there is."""
    free = free_bytes()
    if size > free:
        raise InputError(
            f"{host.FIELD}: {transport} needs {size / 2**30:.2f} GiB of shared memory, {free / 2**30:.2f} GiB are "
            "free; free memory, or use a smaller model or rollout.dtype: bfloat16"
        )


CONTROL = Path("/sys/fs/cgroup")
GROUPS = (
    ("memory.max", "memory.current", "memory.stat", ""),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
)
"""Files of control groups, version 2 and 1: limit, use, statistics, how file pages are called there."""


def free_bytes() -> float:
    """Memory that can still be had: the machine's, or what this control group may still take."""
    machine = next(
        int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line
    )
    return min([machine, *map(_group_free, GROUPS)])


def _group_free(names: tuple[str, str, str, str]) -> float:
    """What a control group may still take, files that it can drop counted as free; infinite without a limit."""
    most, used, statistics, files = names
    try:
        limit = (CONTROL / most).read_text().strip()
        pages = dict(line.split() for line in (CONTROL / statistics).read_text().splitlines())
        kept = sum(int(pages[f"{files}{state}_file"]) for state in ("active", "inactive"))
        return float("inf") if limit == "max" else int(limit) - int((CONTROL / used).read_text()) + kept
    except (OSError, ValueError, KeyError):
        return float("inf")
