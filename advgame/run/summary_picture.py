"""The picture of a run: before and after on the left, curves over the steps on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from advgame.run import names

Bar = tuple[str, float | None, float | None]
"""(label, before, after), fractions of 1."""

# Okabe and Ito's palette: told apart under the common colour-vision deficiencies.
_BLUE, _ORANGE, _GREEN, _VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_GREY = "#767676"

_RATES = (
    ("exploitability", names.EXPLOITABILITY, _VERMILION, "-", "o"),
    ("worst over-refusal", names.OVER_REFUSAL, _BLUE, "-", "s"),
    ("sampled ASR", names.ASR, _ORANGE, "-", None),
    ("benign compliance", names.COMPLIANCE, _GREEN, "-", None),
)
_REWARDS = (
    ("Attacker, harmful", names.reward("harmful", "attacker"), _VERMILION, "-"),
    ("Attacker, benign", names.reward("benign", "attacker"), _VERMILION, "--"),
    ("Defender, harmful", names.reward("harmful", "defender"), _BLUE, "-"),
    ("Defender, benign", names.reward("benign", "defender"), _BLUE, "--"),
)
SMOOTH_ABOVE = 60
"""Curves with more points than this are drawn smoothed, over their pale raw values."""


def draw_summary(path: Path, title: str, bars: Sequence[Bar], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a PNG of 1650 x 780 pixels. Whatever was not measured is left out; no display is needed."""
    figure = Figure(figsize=(11, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, color=_GREY, x=0.01, ha="left")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.0, 1.25))
    _draw_bars(figure.add_subplot(grid[:, 0]), bars)
    _draw_curves(figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1]), rows)
    # matplotlib chooses the format by the suffix, hence a temporary name that keeps it
    temporary = path.with_name(f".tmp-{path.name}")
    figure.savefig(temporary)
    temporary.replace(path)


def curve(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric; rows that lack it are left out."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start (the first value is itself)."""
    average, weight, out = 0.0, 0.0, []
    for value in values:
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        out.append(average / weight)
    return out


def _draw_bars(axes: Axes, bars: Sequence[Bar]) -> None:
    """One row a measure: an open dot before, a filled one after, joined; longer is further apart."""
    axes.set_title("before and after", fontsize=11, loc="left")
    _plain(axes)
    if not bars:
        _nothing(axes)
        return
    for row, (_, before, after) in enumerate(bars):
        if before is not None and after is not None:
            axes.plot((before, after), (row, row), color="#c0c0c0", linewidth=3, zorder=1, solid_capstyle="round")
        if before is not None:
            axes.scatter([before], [row], s=70, facecolor="white", edgecolor=_GREY, linewidth=1.8, zorder=2)
        if after is not None:
            axes.scatter([after], [row], s=80, color=_BLUE, zorder=3)
        _label_ends(axes, row, before, after)
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(-0.24, 1.22)  # room for the numbers beside dots at 0 and 1
    axes.spines["left"].set_visible(False)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.tick_params(axis="y", length=0)
    axes.scatter([], [], s=70, facecolor="white", edgecolor=_GREY, linewidth=1.8, label="before")
    axes.scatter([], [], s=80, color=_BLUE, label="after")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=2, frameon=False, fontsize=9)


def _label_ends(axes: Axes, row: int, before: float | None, after: float | None) -> None:
    """Numbers beside their dots: outwards, or above and below where they would collide."""
    close = before is not None and after is not None and abs(before - after) < 0.14
    for value, other, colour in ((before, after, _GREY), (after, before, _BLUE)):
        if value is None:
            continue
        if close:
            offset, ha, va = ((0, 9), "center", "bottom") if colour == _GREY else ((0, -9), "center", "top")
        elif other is None or value > other:
            offset, ha, va = (8, 0), "left", "center"
        else:
            offset, ha, va = (-8, 0), "right", "center"
        axes.annotate(
            f"{value:.3f}",
            (value, row),
            xytext=offset,
            textcoords="offset points",
            ha=ha,
            va=va,
            color=colour,
            fontsize=9,
        )


def _draw_curves(rates: Axes, rewards: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    rates.set_title("rates over steps", fontsize=11, loc="left")
    rewards.set_title("mean rewards over steps", fontsize=11, loc="left")
    drawn = [_draw_curve(rates, rows, *spec) for spec in _RATES]
    rates.set_ylim(-0.03, 1.03)
    _finish(rates, any(drawn))
    drawn = [_draw_curve(rewards, rows, *spec, None) for spec in _REWARDS]
    _finish(rewards, any(drawn))
    rewards.set_xlabel("step")


def _draw_curve(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    label: str,
    name: str,
    colour: str,
    style: str,
    marker: str | None,
) -> bool:
    steps, values = curve(rows, name)
    if not steps:
        return False
    if len(steps) > SMOOTH_ABOVE:
        axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.25)
        values = smooth(values)
    axes.plot(steps, values, color=colour, linestyle=style, marker=marker, markersize=4, linewidth=1.8, label=label)
    return True


def _finish(axes: Axes, drawn: bool) -> None:
    _plain(axes)
    if drawn:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    else:
        _nothing(axes)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)


def _nothing(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=_GREY)
