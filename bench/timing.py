"""Timing of contenders in alternation, so that a drifting clock or a busy neighbour hits all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """What a contender took."""

    milliseconds: float  # median
    spread: float  # (third quartile − first) / median
    extra_bytes: int | None  # peak of memory above what was there before; None where nobody has measured it


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
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def alternate(
    contenders: Mapping[str, Callable[[], object]], device: torch.device, repeats: int, warm: bool = False
) -> dict[str, Timing]:
    """Medians of `repeats` rounds in which every contender runs once, after a run each that is not counted.

    The caller has made that run itself if the contenders are `warm`.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    memory = {}
    for name, run in contenders.items():
        if not warm:
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
    """The timings against a floor in milliseconds and against the first contender, as lines of text."""
    lines = [title, f"  {'':34}{'ms':>10}{'× floor':>9}{'× first':>9}{'spread':>8}{'extra MiB':>11}"]
    first = next(iter(timings.values()))
    for name, t in timings.items():
        extra = "" if t.extra_bytes is None else f"{t.extra_bytes / 2**20:.0f}"
        ratios = f"{t.milliseconds / floor_ms:9.2f}{t.milliseconds / first.milliseconds:9.2f}"
        lines.append(f"  {name:34}{t.milliseconds:10.2f}{ratios}{t.spread:8.0%}{extra:>11}")
    return "\n".join(lines)
