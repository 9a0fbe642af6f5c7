"""`python -m bench fronts` asks real engines; what it measures is looked at on an idle machine, not here."""

import json

import pytest

from bench import fronts, records

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_both_fronts_are_asked(tmp_path, monkeypatch, capsys):
    pytest.importorskip("vllm")
    pytest.importorskip("ray")
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    assert fronts.main(["--requests", "4", "--rounds", "1", "--out"]) == 0
    assert fronts.ACTOR in capsys.readouterr().out
    (file,) = tmp_path.glob("fronts-cpu-*.json")
    found = json.loads(file.read_text())["result"]
    assert list(found) == [fronts.LOCAL, fronts.ACTOR]
    assert all(milliseconds > 0 for milliseconds in found.values())
