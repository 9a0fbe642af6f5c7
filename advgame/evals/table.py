"""One table of all figures, safety, over-refusal and utility together; and the same as JSON and CSV."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from advgame.evals.metrics import Result

FAMILIES = ("safety", "over-refusal", "utility", "judge")
Key = tuple[str, str, tuple[str, str] | None]
"""Set, metric, and the part of a breakdown."""

Results = Mapping[str, Sequence[Result]]
"""Results by the model's short name."""


def cell(result: Result | None) -> str:
    """Value, interval and n; what was left out, where anything was."""
    if result is None:
        return "-"
    estimate = result.estimate
    left = [
        f"{count} {word}"
        for count, word in (
            (result.failed, "failed"),
            (result.parse_errors, "unparsed"),
            (result.untold, "untold"),
        )
        if count
    ]
    if estimate is None:
        return "no number: " + ", ".join(left)
    scale, form = (100.0, ".1f") if result.percent else (1.0, ".3f")
    value, low, high = (f"{number * scale:{form}}" for number in (estimate.value, estimate.low, estimate.high))
    between = "no interval" if math.isnan(estimate.low) else f"[{low}, {high}]"
    return "; ".join([f"{value} {between} n={estimate.n}", *left])


def make_table(results: Results, *, title: str, parts: bool = False, published: bool = False) -> Table:
    """One row a metric, one column a model; conventions are numbered and stand below.

    parts: rows of each breakdown too; languages are always shown. published: the paper's figures beside yours, where
    the names of sets and metrics are those of `configs/suites/published.yaml`.
    """
    found = {name: {_key(result): result for result in listed} for name, listed in results.items()}
    order = dict.fromkeys(_key(result) for listed in results.values() for result in listed)
    known = published_figures() if published else []
    known = [one for one in known if any(_figure(one, key) is not None for key in order)]
    legend: dict[str, int] = {}
    table = Table(title=title, title_justify="left", caption_justify="left")
    for name in ("metric", "conv."):
        table.add_column(name)
    for name in results:
        table.add_column(name, justify="right")
    for one in known:
        table.add_column(f"{one['model']}\n{one['variant']}\n(published)", justify="right")
    for family in FAMILIES:
        rows = [key for key in order if _any(found, key).family == family]
        for number, key in enumerate(key for key in rows if _shown(key, rows, parts)):
            first = _any(found, key)
            sign = {"lower": " ↓", "higher": " ↑"}.get(first.better, "")
            name = f"{key[0]} {key[1]}{sign}" if key[2] is None else f"  {key[1]}, {key[2][0]} {key[2][1]}"
            text = f"[bold]{family}[/bold]\n{name}" if number == 0 else name
            mark = "" if key[2] is not None else str(legend.setdefault(_convention(first), len(legend) + 1))
            cells = [cell(found[model].get(key)) for model in results]
            figures = [_figure(one, key) for one in known]
            breaks = "\n" if number == 0 else ""
            told = ["" if figure is None else f"{figure:.1f}" for figure in figures]
            table.add_row(text, *(breaks + word for word in (mark, *cells, *told)))
        if rows:
            table.add_section()
    lines = [_CAPTION, *(f"({number}) {text}" for text, number in legend.items())]
    if published and not known:
        lines.append("Published figures: none has the name of a set here; see configs/suites/published.yaml.")
    table.caption = "\n".join(lines)
    return table


def _shown(key: Key, rows: Sequence[Key], parts: bool) -> bool:
    """A breakdown into one part says nothing new."""
    if key[2] is None:
        return True
    siblings = {one[2] for one in rows if one[:2] == key[:2] and one[2] is not None and one[2][0] == key[2][0]}
    return len(siblings) > 1 and (parts or key[2][0] == "language")


def _figure(published: Mapping[str, Any], key: Key) -> float | None:
    if key[2] is not None:
        return None
    return published.get(f"{key[0]}/{key[1]}", published.get(key[0]))


_CAPTION = (
    "Percent with a bootstrap 95 % interval, unless the convention says otherwise. failed: no answer from an engine or "
    "server after all retries, left out; unparsed: see the convention; untold: the classifier does not tell this."
)


def published_figures() -> list[dict[str, Any]]:
    """The published rows, one mapping a model and variant; figures in percent."""
    text = (resources.files("advgame.evals") / "published.yaml").read_text(encoding="utf-8")
    loaded: list[dict[str, Any]] = yaml.safe_load(text)
    return loaded


def _convention(result: Result) -> str:
    form = "" if result.estimate is None else f"{result.estimate.form} mean; "
    return f"{result.convention}; {form}{result.policy}; by {result.classifier}"


def _key(result: Result) -> Key:
    return result.set, result.metric, result.part


def _any(found: Mapping[str, Mapping[Any, Result]], key: Any) -> Result:
    return next(listed[key] for listed in found.values() if key in listed)


def export_json(results: Results, path: Path, more: Mapping[str, Any]) -> None:
    """Everything, nested by model."""
    tree = {name: [_plain(asdict(result)) for result in listed] for name, listed in results.items()}
    path.write_text(json.dumps({**more, "results": tree}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """NaN as null, which every JSON reader knows."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


COLUMNS = (
    "model", "set", "metric", "part", "value", "low", "high", "n", "groups", "form", "failed", "parse_errors", "untold",
    "better", "family", "convention", "policy", "classifier",
)  # fmt: skip


def export_csv(results: Results, path: Path) -> None:
    """One row a figure; values as fractions, not percent."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for name, listed in results.items():
            for result in listed:
                fields = asdict(result) | {"model": name, "part": "=".join(result.part or ())}
                if result.estimate is not None:
                    fields |= asdict(result.estimate) | {"form": result.estimate.form}
                writer.writerow(fields)
