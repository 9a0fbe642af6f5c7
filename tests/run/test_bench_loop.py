"""`bench loop`: the barrier loop is the same run but for its barriers, and the shares are what their names say."""

import json
from pathlib import Path

import pytest

from bench import loop, records
from bench.loop import AHEAD, BARRED, STEPWISE, compare, noise, report

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def run(wall, play, learn, hidden, after):
    return {
        "steps": 10, "after": {"asr": after}, "wall": wall, "play": play, "learn": learn, "publish": 0.5,
        "hidden": hidden, "trees_per_hour": 3600 / wall, "engine_seconds": {"attacker": 2.0}, "judge_share": None,
    }  # fmt: skip


def test_shares_by_hand():
    runs = {
        BARRED: [run(15, 10, 4, 0, 0.1)] * 2,
        STEPWISE: [run(12, 7, 4, 0, 0.10), run(12, 7, 4, 0, 0.12)],
        AHEAD: [run(9, 8, 5, 4.5, 0.11), run(9, 8, 5, 4.5, 0.15)],
    }
    result = compare(runs)
    assert result["hidden_share"] == pytest.approx(4.5 / 5)
    assert result["hidden_share_of_in_step"] == pytest.approx(3 / 4)
    assert result[AHEAD]["against_barriers"] == pytest.approx(15 / 9)
    figure = result["figures"]["asr"]
    assert figure["standard_error"] == pytest.approx((0.01**2 + 0.02**2) ** 0.5)
    assert figure["within_noise"]  # 0.02 apart, two standard errors are 0.045
    text = report(runs, result)
    assert "ahead hides 90% of the shorter" in text
    assert "75% of that of the run in step" in text
    assert "within noise" in text


def test_noise():
    assert noise([0.0, 0.01], [0.5, 0.51])["within_noise"] is False
    assert noise([0.3, 0.3], [0.3, 0.3])["within_noise"] is True
    assert noise([0.3], [0.3])["within_noise"] is None


@pytest.mark.slow
def test_three_short_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    few = ["--steps", "3", "--seeds", "1", "--set", "data.harmful", "2", "--set", "data.benign", "2"]
    assert loop.main(["--config", str(TINY), *few, "--out"]) == 0
    (file,) = tmp_path.glob("loop-tiny-*.json")
    made = json.loads(file.read_text())
    assert [len(made["runs"][way]) for way in (BARRED, STEPWISE, AHEAD)] == [1, 1, 1]
    # the same seeds, weights and random streams: barriers change the clock, not the game
    assert made["runs"][BARRED][0]["after"] == pytest.approx(made["runs"][STEPWISE][0]["after"], abs=1e-3)
    assert made["result"]["hidden_share"] >= 0
    assert "ahead hides" in capsys.readouterr().out
