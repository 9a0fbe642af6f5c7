"""A run whose folder takes no more ends with one line, goes on from its last checkpoint, and has every tree once."""

import resource
import signal

import models
import pytest
from defender_runs import CHAPTERS, config_file, metrics

from advgame import cli
from advgame.run.checkpoint_files import checkpoint_problem, list_checkpoints
from advgame.run.recorder import Recorder, read_trees, tree_files

ROOM = 100
"""Bytes of a file, and no more: less than any tree or row."""


@pytest.fixture
def words(tmp_path):
    run = {"root": str(tmp_path), "purpose": "a test", "steps": 5, "checkpoint_every": 2, "validate_every": 0}
    config = config_file(
        tmp_path,
        models.folder(tmp_path / "player"),
        CHAPTERS,
        run=run | {"deterministic": True, "tensorboard": False},
        data={"harmful": 4, "benign": 4, "validation_limit": 8},
        max_tokens=40,
        game={"responses": 4},
    )
    return ["train", str(config), "--quiet"]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["trees", "metrics"])
def test_a_full_disk(words, tmp_path, monkeypatch, capsys, what):
    """The system refuses what is written in step 3, of which no checkpoint knows."""
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    assert cli.main([*words, "--run.name", "whole"]) == 0
    write, (soft, hard) = getattr(Recorder, what), resource.getrlimit(resource.RLIMIT_FSIZE)

    def into_little_room(self, step, *arguments):
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, hard))
        try:
            return write(self, step, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    run = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, what, into_little_room)
        capsys.readouterr()
        assert cli.main([*words, "--run.name", "cut"]) == 1
    assert (
        capsys.readouterr().err
        == f"advgame: {run}: File too large; free some room, then continue with: advgame resume {run}\n"
    )
    assert [step for step, _ in list_checkpoints(run / "checkpoints")] == [2]
    assert checkpoint_problem(run / "checkpoints" / "step-000002") is None
    assert cli.main(["resume", str(run), "--quiet"]) == 0
    found = [(one.tree.step, one.tree.index) for file in tree_files(run / "trees") for one in read_trees(file)]
    assert sorted(found) == [(step, i) for step in range(5) for i in range(8)]
    assert metrics(run) == metrics(tmp_path / "whole")
    assert not [path for path in run.rglob(".*") if path.name != ".lock"]
