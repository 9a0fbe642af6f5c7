"""The summary at the end of a run: `summary.json`, one table before and after, and one picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from advgame.run.folder import RunFolder, write_text_atomically
from advgame.run.names import LABELS
from advgame.run.recorder import read_metrics
from advgame.run.summary_picture import draw_summary

BEFORE_AND_AFTER = ("exploitability", "exploitability_bound", "asr", "benign_compliance", "worst_over_refusal")
AFTER_ONLY = ("heldout_exploitability", "gibberish")

JUDGE_LABELS = {
    "judge_agreement_exact": "judge: scores as the rule's ↑",
    "judge_agreement_order": "judge: pairs in the rule's order ↑",
    "judge_agreement_difference": "judge: distance from the rule, points ↓",
    "judge_agreement_faithful": "judge: faithfulness as the rule's ↑",
    "judge_agreement_no_verdict": "judge: no verdict ↓",
}
"""What the table and the picture call a measure, and which way is better."""

History = Sequence[Mapping[str, Any]]
"""Rows of `metrics.jsonl`, as `read_metrics` gives them."""


def spread(values: Sequence[float], form: str) -> str:
    """The mean, and the lowest and highest of several, each by the format `form`; "-" for none."""
    if not values:
        return "-"
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def write_summary(
    folder: RunFolder,
    before: Mapping[str, float | None],
    after: Mapping[str, float | None],
    seconds: float,
    history: History | None = None,
    *,
    more: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> Path:
    """Writes `summary.json` and `summary.png`, prints the table, and returns the path of `summary.json`.

    `before` and `after` are measured at the start and the end, under the bare names of `BEFORE_AND_AFTER` and
    `AFTER_ONLY` or any other name; `summary.json` has `<name>_before` and `<name>_after` for each, null where
    it was not measured (a run without a world), `seconds`, and the JSON-able entries of `more`. Rates are
    fractions of 1. `history` defaults to the folder's metrics.
    """
    rows = read_metrics(folder.metrics) if history is None else history
    summary = summary_values(before, after, seconds, more)
    write_text_atomically(folder.summary, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    (console or Console()).print(summary_table(before, after, seconds))
    shown = [name for name in LABELS if _known(before, name) is not None or _known(after, name) is not None]
    bars = [(LABELS[name], _known(before, name), _known(after, name)) for name in shown]
    draw_summary(folder.picture, folder.name, bars, rows)
    return folder.summary


def summary_values(
    before: Mapping[str, float | None],
    after: Mapping[str, float | None],
    seconds: float,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of `summary.json`; a value that is not finite is null."""
    values: dict[str, Any] = {}
    for name in BEFORE_AND_AFTER:
        values[f"{name}_before"] = _known(before, name)
        values[f"{name}_after"] = _known(after, name)
    for name in AFTER_ONLY:
        values[f"{name}_after"] = _known(after, name)
    for side, given in (("before", before), ("after", after)):
        values |= {f"{name}_{side}": _known(given, name) for name in given}
    return {**values, "seconds": seconds, **(more or {})}


def summary_table(before: Mapping[str, float | None], after: Mapping[str, float | None], seconds: float) -> Table:
    """What was measured, before and after; a dash where it was not."""
    table = Table(title=f"before and after ({seconds:.0f} s)", title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    named = [*LABELS, *sorted((set(before) | set(after)) - set(LABELS))]
    for name in named:
        pair = (_known(before, name), _known(after, name))
        if pair != (None, None):
            table.add_row(
                (LABELS | JUDGE_LABELS).get(name, name), *("-" if value is None else f"{value:.3f}" for value in pair)
            )
    return table


def _known(values: Mapping[str, float | None], name: str) -> float | None:
    value = values.get(name)
    return float(value) if value is not None and math.isfinite(value) else None
