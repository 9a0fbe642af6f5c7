"""Timing of contenders in alternation, so that a drifting clock or a busy neighbour hits all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """What a contender took."""

    milliseconds: float  # median
    spread: float  # (third quartile − first) / median
    extra_bytes: int | None  # peak of memory above what was there before, of the device or of this process


def _once(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def _extra_memory(run: Callable[[], object], device: torch.device) -> int | None:
    gc.collect()
    if device.type != "cuda":
        return _extra_resident(run)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _extra_resident(run: Callable[[], object]) -> int | None:
    """Peak resident memory of this process above the level before, in bytes; Linux forgets the old peak when told."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{name}:")))


def alternate(contenders: Mapping[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, Timing]:
    """Medians of `repeats` rounds in which every contender runs once; two rounds of warm-up are not counted."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    memory = {}
    for name, run in contenders.items():
        run()
        memory[name] = _extra_memory(run, device)
    for _ in range(repeats):
        for name, run in contenders.items():
            samples[name].append(_once(run, device))
    timings = {}
    for name, times in samples.items():
        middle = statistics.median(times)
        quarters = statistics.quantiles(times, n=4) if len(times) > 1 else [middle] * 3
        timings[name] = Timing(middle, (quarters[2] - quarters[0]) / middle, memory[name])
    return timings


def table(title: str, timings: Mapping[str, Timing], floor_ms: float) -> str:
    """The timings against a floor in milliseconds, as lines of text."""
    lines = [title, f"  {'':34}{'ms':>10}{'× floor':>9}{'spread':>8}{'extra MiB':>11}"]
    for name, t in timings.items():
        extra = "" if t.extra_bytes is None else f"{t.extra_bytes / 2**20:.0f}"
        ratio = t.milliseconds / floor_ms
        lines.append(f"  {name:34}{t.milliseconds:10.2f}{ratio:9.2f}{t.spread:8.0%}{extra:>11}")
    return "\n".join(lines)
