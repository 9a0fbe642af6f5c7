"""`advgame resources RUN [RUN ...]`: what runs had used when they first were good enough.

Runs are compared at equal quality, not at equal steps: the joint game against rounds in turns, one engine against
another, one judge against another. What a run used is added up over its steps, evaluation left out, to the first row
of its metrics at which every condition of `--until` holds.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from advgame.errors import InputError
from advgame.report.arguments import GOOD_ENOUGH
from advgame.report.collect import open_run
from advgame.run import names
from advgame.run.energy import JOULES_PER_KWH
from advgame.run.folder import write_text_atomically
from advgame.run.recorder import read_metrics
from advgame.run.summary import spread

SUMS = {
    "seconds": "seconds, evaluation left out",
    "hours of engines": "hours with requests in flight, over all roles",
    "processor seconds": "of the trainer's own processes",
    "kWh": "GPUs and processor packages, as far as this machine's counters can be read",
    "CO2e kg": "by run.carbon",
}
PEAKS = {"memory GiB": "most resident memory of the trainer's processes", "GPU GiB": "most memory in use on all GPUs"}


@dataclass(frozen=True)
class Condition:
    """`metric` (a column of metrics.jsonl) at most, or at least, `bound`."""

    metric: str
    at_most: bool
    bound: float

    def holds(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


@dataclass(frozen=True)
class Used:
    """What a run used up to `step`; with `step` None it never got there, and `values` are of all that it did."""

    run: Path
    step: int | None
    values: Mapping[str, float]


def run_resources(arguments: argparse.Namespace) -> int:
    """0 if every run got there, 1 if one did not. Raises InputError for bad input."""
    conditions = [condition_of(text) for text in arguments.until or GOOD_ENOUGH]
    found = [used(open_run(path).path, conditions) for path in arguments.runs]
    console = Console()
    console.print(table_of(groups_of(found)))
    late = [one.run for one in found if one.step is None]
    for run in late:
        console.print(f"{run}: not good enough by its end; the figures are of all its steps", markup=False)
    if arguments.out is not None:
        tree = [{"run": str(one.run), "step": one.step, **one.values} for one in found]
        write_text_atomically(arguments.out, json.dumps(tree, indent=1) + "\n")
    return 1 if late else 0


def condition_of(text: str) -> Condition:
    """Of "exploitability<=0.1", short names being those of `summary.json`. Raises InputError."""
    match = re.fullmatch(r"\s*(\S+?)\s*(<=|>=)\s*(\S+)\s*", text)
    try:
        bound = float(match[3]) if match else math.nan
    except ValueError:
        bound = math.nan
    if match is None or not math.isfinite(bound):
        raise InputError(f"--until {text!r}: write a metric, <= or >=, and a number, as in exploitability<=0.1")
    metric = names.EVAL_PREFIX + match[1] if match[1] in names.LABELS else match[1]
    return Condition(metric, match[2] == "<=", bound)


def used(run: Path, conditions: Sequence[Condition]) -> Used:
    """Sums and peaks of a run's rows until the conditions hold. Raises InputError: a metric that it never measured."""
    rows = read_metrics(run / "metrics.jsonl")
    for condition in conditions:
        if not any(isinstance(row.get(condition.metric), int | float) for row in rows):
            known = sorted({key for row in rows for key in row if key.startswith((names.EVAL_PREFIX, "validation/"))})
            raise InputError(
                f"--until {condition.metric}: {run} never measured it; known: {', '.join(known) or 'none'}"
            )
    sums: Counter[str] = Counter()
    peaks: dict[str, float] = {}
    for row in rows:
        # a row's evaluation is of the weights before its step
        if all(isinstance(v := row.get(c.metric), int | float) and c.holds(v) for c in conditions):
            return Used(run, int(row["step"]), {**sums, **peaks})
        for name, value in costs(row).items():
            sums[name] += value  # type: ignore[assignment]  # a Counter of floats
        for name, value in memory(row).items():
            peaks[name] = max(peaks.get(name, 0.0), value)
    return Used(run, None, {**sums, **peaks})


def costs(row: Mapping[str, Any]) -> dict[str, float]:
    """What one step added, by the names of SUMS; what was not measured is left out."""
    if names.STEP_SECONDS not in row:
        return {}
    found = {"seconds": row[names.STEP_SECONDS] - row.get(names.stage_seconds("validate"), 0.0)}
    busy = [value for key, value in row.items() if key.startswith(names.engine_seconds(""))]
    if busy:
        found["hours of engines"] = sum(busy) / 3600
    if names.PROCESS_SECONDS in row:
        found["processor seconds"] = row[names.PROCESS_SECONDS] - row.get(names.EVALUATION_SECONDS, 0.0)
    joules = row.get(f"{names.ENERGY_PREFIX}joules")
    if joules is not None:
        game = joules - row.get(names.EVALUATION_JOULES, 0.0)
        found["kWh"] = game / JOULES_PER_KWH
        found["CO2e kg"] = row[f"{names.ENERGY_PREFIX}co2e_g"] / 1e3 * game / max(joules, 1e-9)
    return found


def memory(row: Mapping[str, Any]) -> dict[str, float]:
    """Memory in use at a step's end, by the names of PEAKS."""
    found = {}
    if names.PROCESS_MEMORY in row:
        found["memory GiB"] = row[names.PROCESS_MEMORY]
    cards = [value for key, value in row.items() if re.fullmatch(rf"{names.ENERGY_PREFIX}gpu\d+_memory_gib", key)]
    return found | ({"GPU GiB": sum(cards)} if cards else {})


def groups_of(found: Sequence[Used]) -> dict[str, list[Used]]:
    """Runs whose names differ in the digits of a seed alone, in one folder, are one group: `lab/easy/dpo-md/seed*`."""
    groups: dict[str, list[Used]] = {}
    for one in found:
        path = one.run.resolve()
        family = re.sub(r"\d+$", "", path.name)
        name = path.parent.name if family == "seed" else family.rstrip("-_.") or path.name
        groups.setdefault(name if family != path.name else path.name, []).append(one)
    return groups


def table_of(groups: Mapping[str, Sequence[Used]]) -> Table:
    """Means over each group, with the lowest and highest where there are several runs."""
    columns = [name for name in (*SUMS, *PEAKS) if any(name in one.values for g in groups.values() for one in g)]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("", "runs", "step", *columns):
        table.add_column(name, justify="left" if not name else "right")
    for name, group in groups.items():
        steps = [float(one.step) for one in group if one.step is not None]
        reached = spread(steps, ".0f") if len(steps) == len(group) else f"{len(steps)} of {len(group)} got there"
        cells = [spread([one.values[c] for one in group if c in one.values], ".3g") for c in columns]
        table.add_row(name, str(len(group)), reached, *cells)
    return table
