"""Peak memory of a stretch of work above what was there before."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from types import TracebackType

import torch
from advgame_kernels import memory


class Peak:
    """`with Peak(device) as peak: ...`; afterwards `peak.bytes`: of the GPU's allocator, or of this process; and
    `peak.whole`: what was there before included.

    A process's peak is the kernel's own count, set back at the start (Linux), so that nothing between two looks is
    missed; memory that malloc and our own pool keep for later is given back first.
    """

    def __init__(self, device: torch.device):
        self.bytes = self.whole = 0
        self._gpu = device.type == "cuda"
        self._before = 0

    def __enter__(self) -> Peak:
        gc.collect()
        if self._gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            memory.release()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _kilobytes("VmRSS") * 1024
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.whole = torch.cuda.max_memory_allocated() if self._gpu else _kilobytes("VmHWM") * 1024
        self.bytes = self.whole - self._before


def _kilobytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status names no {name}")
