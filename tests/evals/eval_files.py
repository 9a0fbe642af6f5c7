"""Small files in the evaluation sets' own formats, and what to do with them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from advgame.evals.classify import Verdict
from advgame.evals.metrics import scoreboard
from advgame.evals.suites import SetSettings, load_set


def table(path: Path, rows, delimiter=",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def lines(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def behaviours(path: Path, count=3) -> Path:
    rows = [
        {
            "Behavior": f"do {name}",
            "FunctionalCategory": kind,
            "SemanticCategory": "misc",
            "Tags": "",
            "ContextString": context,
            "BehaviorID": name,
        }
        for name, kind, context in [("b0", "standard", ""), ("b1", "contextual", "some text"), ("b2", "copyright", "")]
    ]
    return table(path, rows[:count])


def measured(settings: SetSettings, verdicts: dict[str, Verdict]):
    """{metric: (value, n)} of a set's rows with the given verdicts by row id, and all results."""
    board = scoreboard(settings.set, settings.convention, settings.by)
    for row in load_set(settings):
        board.add(row, verdicts[row.id])
    results = board.results(settings.label, "by hand")
    whole = {r.metric: (r.estimate.value, r.estimate.n) for r in results if r.part is None and r.estimate}
    return whole, results


H, S, R, C = (
    Verdict(harmful=True, refused=False),
    Verdict(harmful=False, refused=False),
    Verdict(harmful=False, refused=True),
    Verdict(harmful=False, refused=False),
)
PARSE, FAIL = Verdict(parse_error=True), Verdict(error="down")
