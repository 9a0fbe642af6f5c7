"""The players' updates at the same time: on a GPU each on a stream of its own, where memory allows.

Small kernels of one player then run beside those of the other, and neither waits for the other's numbers. Both players'
activations are in memory at once, so that what each needs is measured first, while they still take turns. Players that
train on ranks of their own learn at the same time always; on the same ranks never: collectives need one order there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

import torch

T = TypeVar("T")

MEASURED_STEPS = 2
"""Steps in which players take turns and their memory is measured."""
MARGIN = 1.5
"""Free memory over what was measured: later batches may be larger."""


class SideBySide:
    """Runs a step's updates, one a player. allowed: False takes turns (`learn.streams: off`, no GPU). apart: each
    player's update runs elsewhere, so that they need no room here."""

    def __init__(self, device: torch.device, *, allowed: bool, apart: bool = False) -> None:
        self._apart = apart
        self.allowed = allowed and device.type == "cuda"
        self._device = device
        self._needs: dict[int, int] = {}
        self._measured = 0
        self._streams: list[torch.cuda.Stream] = []

    def run(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """The results of all `tasks`, in their order."""
        if self._apart and len(tasks) > 1:
            return self.together(tasks)
        if not self.allowed or len(tasks) < 2:
            return [task() for task in tasks]
        if self._measured >= MEASURED_STEPS and len(self._needs) == len(tasks) and self.fits():
            return self.together(tasks)
        results = [self._measuring(number, task) for number, task in enumerate(tasks)]
        self._measured += 1
        return results

    def fits(self) -> bool:
        """Whether all tasks' measured memory, with a margin, is free on the device or kept by torch for reuse."""
        free, _ = torch.cuda.mem_get_info(self._device)
        kept = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return enough(list(self._needs.values()), free + kept)

    def together(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """All at once, each in a thread (and on a GPU on a stream) of its own; returns when all have ended.

        Raises the first task's error, after the others have ended.
        """
        gpu = self._device.type == "cuda"
        while gpu and len(self._streams) < len(tasks):
            self._streams.append(torch.cuda.Stream(self._device))
        here = torch.cuda.current_stream(self._device) if gpu else None

        def one(number: int, task: Callable[[], T]) -> T:
            with ExitStack() as stack:
                if here is not None:
                    torch.cuda.set_device(here.device)
                    self._streams[number].wait_stream(here)
                    stack.enter_context(torch.cuda.stream(self._streams[number]))
                return task()

        with ThreadPoolExecutor(len(tasks), "learn") as threads:
            started = [threads.submit(one, number, task) for number, task in enumerate(tasks)]
        if here is not None:
            for stream in self._streams:
                here.wait_stream(stream)
        return [future.result() for future in started]

    def _measuring(self, number: int, task: Callable[[], T]) -> T:
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        result = task()
        needed = torch.cuda.max_memory_allocated(self._device) - before
        self._needs[number] = max(self._needs.get(number, 0), needed)
        return result


def enough(needs: Sequence[int], free: int) -> bool:
    """Whether `free` bytes hold all of `needs` at once, with the margin."""
    return MARGIN * sum(needs) <= free
