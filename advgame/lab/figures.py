"""The lab's figures: curves over steps and the frontier of safety and compliance."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from advgame.lab.jobs import Job
from advgame.lab.results import Row, gap_series, series
from advgame.run import names

Points = Callable[[Job], Sequence[tuple[int, float]]]


def _metric(name: str) -> Points:
    return partial(series, metric=name)


CURVES: dict[str, tuple[Points, str]] = {
    "exploitability": (_metric(names.EXPLOITABILITY), "exact exploitability"),
    "over-refusal": (_metric(names.OVER_REFUSAL), "exact worst over-refusal"),
    "heldout": (_metric(names.HELDOUT_EXPLOITABILITY), "exact exploitability, held-out framings"),
    "asr": (_metric(names.ASR), "success of the current Attacker in play; the Defender's best-response gap"),
    "gap": (gap_series, "the Attacker's best-response gap"),
    "reward": (_metric(names.reward("harmful", "defender")), "Defender's reward on harmful seeds"),
}


def draw_figures(jobs: Sequence[Job], rows: Sequence[Row], folder: Path) -> list[Path]:
    """SVG files in `folder`: one a curve and world, and one frontier a world."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    done = [job for job in jobs if job.done]
    for world in dict.fromkeys(job.world for job in done):
        here = [job for job in done if job.world == world]
        for name, (points, label) in CURVES.items():
            path = folder / f"{world}-{name}.svg"
            if _curves(here, points, label, path):
                written.append(path)
        path = folder / f"{world}-frontier.svg"
        _frontier([row for row in rows if row.world == world], path)
        written.append(path)
    return written


def _curves(jobs: Sequence[Job], points: Points, label: str, path: Path) -> bool:
    """Means over seeds at the steps that all seeds of a variant have; False if nothing was measured."""
    figure, axes = plt.subplots(figsize=(9, 5))
    drawn = False
    colours = plt.get_cmap("tab20")
    for place, name in enumerate(dict.fromkeys(job.variant.name for job in jobs)):
        runs = [dict(points(job)) for job in jobs if job.variant.name == name]
        steps = sorted(set.intersection(*(set(run) for run in runs)))
        if not steps:
            continue
        means = [statistics.fmean(run[step] for run in runs) for step in steps]
        axes.plot(steps, means, label=name, color=colours(place % 20), linestyle="-" if place < 20 else "--")
        drawn = True
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    if drawn:
        axes.legend(fontsize=7, ncols=2, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
    return drawn


def _frontier(rows: Sequence[Row], path: Path) -> None:
    """Exploitability against benign compliance, error bars of one standard error; lower right is better."""
    figure, axes = plt.subplots(figsize=(7, 5))
    for row in rows:
        harm, kind = row.mean("harm"), row.mean("compliance")
        if harm is None or kind is None:
            continue
        axes.errorbar(kind.mean, harm.mean, xerr=kind.error, yerr=harm.error, fmt="o", markersize=4)
        axes.annotate(row.variant, (kind.mean, harm.mean), fontsize=7, xytext=(4, 3), textcoords="offset points")
    axes.set_xlabel("mean benign compliance")
    axes.set_ylabel("exact exploitability")
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
