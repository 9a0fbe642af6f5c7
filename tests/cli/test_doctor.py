"""`advgame doctor` on this machine, and on one with something wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from advgame import cli, doctor

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def test_this_machine_can_play_the_tiny_world(tmp_path, capsys):
    code = cli.main(["doctor", str(TINY), "--root", str(tmp_path)])
    out = capsys.readouterr().out
    assert code == 0, out
    for what in ("python", "torch", "transformers", "C++ kernels", "/dev/shm", "runs", "loopback", "config"):
        assert what in out
    assert "0 to mend" in out


def test_a_config_that_cannot_run_is_a_failure(tmp_path, capsys):
    assert cli.main(["doctor", str(TINY), "--data.train", str(tmp_path / "none.jsonl")]) == 1
    out = capsys.readouterr().out
    assert "fail  config" in out
    assert "none.jsonl" in out


def test_a_root_that_is_a_file_is_a_failure(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    (runs, _) = doctor.storage(blocked / "runs")
    assert (runs.what, runs.status) == ("runs", "fail")
    assert "run.root" in runs.mend


def test_versions_outside_the_range_name_the_mend(monkeypatch):
    monkeypatch.setitem(doctor.SUPPORTED, "transformers", ("99.0", None))
    (found,) = [one for one in doctor.packages() if one.what == "transformers"]
    assert found.status == "fail"
    assert found.mend == "pip install 'transformers>=99.0'"


def test_more_threads_than_cores_is_worth_knowing(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    (found,) = [one for one in doctor.limits() if one.what == "cores"]
    assert found.status == "warn"
    assert found.mend.startswith("export OMP_NUM_THREADS=")


@pytest.mark.parametrize(("text", "parts"), [("2.13.0+cpu", (2, 13, 0)), ("5.19", (5, 19)), ("0.32.0rc1", (0, 32))])
def test_parts(text, parts):
    assert doctor._parts(text) == parts
