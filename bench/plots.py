"""A benchmark's timings as bars, each panel with its floor drawn in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def _panels(result: dict[str, Any]) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """(title, floor in ms, timings) of every measurement in a result of bench.kernels."""
    for name, part in result.items():
        if not isinstance(part, dict):
            continue
        if "timings" in part:
            yield name, part["floor_ms"], part["timings"]
        elif "floors_ms" in part:
            floors = part["floors_ms"]
            yield f"{name}, forward", floors["forward"], part["forward"]
            yield f"{name}, forward and backward", floors["forward"] + floors["backward"], part["both"]


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the plot; matplotlib is imported here, since the benchmark itself does without."""
    from matplotlib.figure import Figure

    panels = list(_panels(result))
    figure = Figure(figsize=(9, 1.7 * len(panels)), layout="constrained")
    figure.suptitle(result["device"])
    for place, (title, floor, timings) in enumerate(panels, 1):
        axes = figure.add_subplot(len(panels), 1, place)
        names = list(timings)[::-1]
        values = [timings[n]["milliseconds"] for n in names]
        bars = axes.barh(names, values, color=["#1f6f8b" if n.startswith("ours") else "#b8b8b8" for n in names])
        extra = [timings[n].get("extra_bytes") for n in names]
        labels = [f"{v:.2f}" + (f"   {e / 2**20:.0f} MiB" if e else "") for v, e in zip(values, extra, strict=True)]
        axes.bar_label(bars, labels, padding=3, fontsize=8)
        axes.axvline(floor, color="#c0392b", linewidth=1)
        axes.set_title(f"{title} (ms, extra memory; line: floor {floor:.2f})", fontsize=9, loc="left")
        axes.set_xlim(0, 1.25 * max(values))
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.savefig(path)
