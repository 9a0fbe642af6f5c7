"""A short soak: a run killed at random moments is whole in the end, equals one nobody killed, and leaves nothing."""

import gzip
import json
import subprocess
import sys

import models
import pytest
from defender_runs import SHORT, config_file

from bench import records, soak, traces
from bench.soak_checks import differences, problems


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_is_killed_again_and_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    kept = tmp_path / "kept"
    config = config_file(
        tmp_path,
        models.folder(tmp_path / "player"),
        SHORT,
        run={"threads": 1, "tensorboard": True},
        data={},
        max_tokens=60,
        game={"responses": 4},
    )
    few = ["--config", str(config), "--steps", "12", "--kill-every", "3", "--set", "run.checkpoint_every", "2"]
    assert soak.main([*few, "--twin", "--keep", str(kept), "--out"]) == 0, capsys.readouterr().out
    (file,) = tmp_path.glob("soak-transformers-*.json")
    result = json.loads(file.read_text())["result"]
    assert sum(result["kills"].values()) >= 2
    assert result["trees"] == 48
    assert capsys.readouterr().out.count("nothing wrong") == 3

    # and the checks do find what they look for
    run, whole = kept / "run", kept / "whole" / "run"
    assert not problems(run, steps=12, trees=4, keep=2)
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*rows[:3], rows[2], *rows[4:]]))
    (run / "trees" / "000005.jsonl.gz").unlink()
    with gzip.open(run / "trees" / "000007.jsonl.gz", "rt") as lines:
        first, *_ = lines
    with gzip.open(run / "trees" / "000007.jsonl.gz", "wt") as lines:
        lines.write(first * 4)
    (run / "checkpoints" / ".tmp-step-000012-1").mkdir()
    (run / "checkpoints" / "step-000012" / "defender" / "config.json").unlink()
    found = "\n".join(problems(run, steps=12, trees=4, keep=2))
    for word in ("once: [2, 3]", "11 files of 12", "(7, 1)", ".tmp-step-000012-1", "config.json is missing"):
        assert word in found, (word, found)
    assert differences(whole, whole) == []


def test_what_a_process_leaves_is_seen():
    """A child in a session of its own and one that lost the word are both found; its port, too."""
    code = "import socket, time; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); print(s.getsockname()[1]); "
    code += "time.sleep(60)"
    listening = subprocess.Popen(
        [sys.executable, "-uc", code], stdout=subprocess.PIPE, text=True, start_new_session=True,
        env={traces.VARIABLE: "some-word"},
    )  # fmt: skip
    try:
        port = int(listening.stdout.readline())
        by_word, by_session = traces.run_processes("some-word", -1), traces.run_processes("other", listening.pid)
        assert [one.pid for one in by_word] == [one.pid for one in by_session] == [listening.pid]
        assert traces.listeners([listening.pid]) == {("127.0.0.1", port)}
        assert traces.still_listening({("127.0.0.1", port)})
        traces.end(by_word)
        assert traces.wait_for(lambda: [p for p in by_word if traces.alive(p)], 10) < 10
        assert not traces.still_listening({("127.0.0.1", port)})
    finally:
        listening.kill()
        listening.wait()
