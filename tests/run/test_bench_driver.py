"""`python -m bench driver` plays whole trees; what it measures is looked at on an idle machine, not here."""

import json
from datetime import date

import pytest

from bench import driver, records


@pytest.mark.slow
def test_the_bench_plays_whole_trees_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    assert driver.main(["--trees", "2", "5", "--rounds", "1", "--out"]) == 0
    assert "ours at most" in capsys.readouterr().out
    (file,) = tmp_path.glob("driver-cpu-*.json")
    assert date.fromisoformat(file.stem[-10:])
    found = json.loads(file.read_text())
    assert list(found["result"]) == ["2", "5"]
    row = found["result"]["5"]
    assert row["ours"] + row["tokenizer"] == pytest.approx(row[driver.WHOLE] - row[driver.ALONE])
