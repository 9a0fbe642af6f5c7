"""Peak memory of a run on the CPU: how far the resident set rises, in a fresh process that does nothing else.

The process is forked from a server that has imported torch and run nothing, so no allocator holds anything back. It
makes its inputs, runs once at a small size (thread pools, lazy imports, generated code), sets the kernel's mark of the
highest resident set back to the present one, runs, and reads the mark. Linux only: elsewhere None.
"""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.records import reason
from bench.timing import Timing

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _kibibytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found.group(1))


def _child(prepare: Callable[..., Callable[[], object]], arguments: tuple[Any, ...], answer: Connection) -> None:
    try:
        run = prepare(*arguments)
        CLEAR.write_text("5")  # VmHWM starts again from VmRSS
        before = _kibibytes("VmRSS")
        run()
        answer.send((_kibibytes("VmHWM") - before) << 10)
    except Exception as error:  # crosses a process: the parent says who failed and why
        answer.send(reason(error))


def with_peaks(
    timings: Mapping[str, Timing], device: torch.device, prepare: Callable[..., Callable[[], object]], *arguments: Any
) -> dict[str, Timing]:
    """The timings with the peak of `prepare(*arguments, name)` of each on a CPU; on a GPU they have theirs already."""
    if device.type != "cpu":
        return dict(timings)
    peaks = {name: peak_in_child(prepare, *arguments, name) for name in timings}
    return {n: replace(t, extra_bytes=p if isinstance(p := peaks[n], int) else None) for n, t in timings.items()}


def peak_in_child(prepare: Callable[..., Callable[[], object]], *arguments: Any) -> int | str | None:
    """Bytes by which `prepare(*arguments)()` raises the resident set, or what went wrong, or None without /proc.

    `prepare` is a function of a module; what it does beforehand, its inputs and warm-up, does not count.
    """
    if not STATUS.exists():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "advgame_kernels", "bench.head"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(prepare, arguments, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        return f"the process ended with code {process.exitcode}"
    finally:
        process.join()
