"""The summary: keys, nulls, table and a picture of something."""

import io
import json
import math
import random

import pytest
from matplotlib.image import imread
from rich.console import Console

from advgame.run import names
from advgame.run.folder import RunFolder
from advgame.run.recorder import Recorder
from advgame.run.summary import write_summary
from advgame.run.summary_picture import curve, smooth

BEFORE = {"exploitability": 0.81, "asr": 0.42, "benign_compliance": 0.78, "worst_over_refusal": 0.9}
AFTER = {"exploitability": 0.02, "asr": 0.03, "benign_compliance": 0.99, "worst_over_refusal": 0.04,
         "heldout_exploitability": 0.7, "gibberish": 0.0}  # fmt: skip
REQUIRED = {
    "exploitability_bound_before",
    "exploitability_bound_after",
    *(f"{name}_{side}" for name in BEFORE for side in ("before", "after")),
    "heldout_exploitability_after",
    "gibberish_after",
    "seconds",
}


def rows(steps=300, world=True):
    draw = random.Random(0)
    for step in range(steps):
        fade = math.exp(-step / 60)
        row = {
            "step": step,
            names.ASR: max(0.0, 0.4 * fade + draw.gauss(0, 0.03)),
            names.COMPLIANCE: min(1.0, 1 - 0.2 * fade + draw.gauss(0, 0.02)),
            names.reward("harmful", "attacker"): 5 * fade + draw.gauss(0, 0.4),
            names.reward("benign", "attacker"): 3 * fade + draw.gauss(0, 0.4),
            names.reward("harmful", "defender"): 8 - 4 * fade + draw.gauss(0, 0.3),
            names.reward("benign", "defender"): 9 - 3 * fade + draw.gauss(0, 0.3),
        }
        if world and step % 25 == 0:
            row |= {names.EXPLOITABILITY: 0.02 + 0.79 * fade, names.OVER_REFUSAL: 0.04 + 0.86 * fade}
        yield row


@pytest.fixture
def folder(tmp_path):
    with RunFolder.create(tmp_path, "run", "", purpose="a test") as folder:
        yield folder


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=100)


def test_everything_of_a_world(folder, console):
    with Recorder(folder) as recorder:
        for row in rows():
            recorder.metrics(row.pop("step"), row)
    path = write_summary(folder, BEFORE, AFTER, 171.4, more={"attempts": 1}, console=console)
    summary = json.loads(path.read_text())
    assert set(summary) >= REQUIRED
    assert summary["exploitability_before"] == 0.81
    assert summary["heldout_exploitability_after"] == 0.7
    assert summary["attempts"] == 1
    table = console.file.getvalue()
    assert "171 s" in table
    assert "0.810" in table
    picture = imread(folder.picture)
    assert picture.shape[:2] == (780, 1650)
    assert picture.std() > 0.05, "not a blank page"


def test_a_run_without_a_world(folder, console):
    before, after = {"asr": 0.5, "benign_compliance": math.nan}, {"asr": 0.25, "worse_thing": 2.0}
    path = write_summary(folder, before, after, 5.0, list(rows(9, world=False)), console=console)
    summary = json.loads(path.read_text())
    assert set(summary) == REQUIRED | {"worse_thing_after"}
    assert summary["exploitability_before"] is None
    assert summary["benign_compliance_before"] is None
    table = console.file.getvalue()
    assert "exploitability" not in table
    assert "worse_thing" in table


def test_nothing_measured(folder, console):
    summary = json.loads(write_summary(folder, {}, {}, 0.0, console=console).read_text())
    assert set(summary) == REQUIRED
    assert imread(folder.picture).size


def test_curves_leave_out_absent_and_null():
    history = [{"step": 0, "a": 1.0}, {"step": 1, "a": None}, {"step": 2}, {"step": 3, "a": 0.0}]
    assert curve(history, "a") == ([0, 3], [1.0, 0.0])


def test_smoothing_starts_at_the_first_value_and_keeps_constants():
    assert smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    assert smooth([1.0, 0.0])[0] == pytest.approx(1.0)
    assert smooth([]) == []
