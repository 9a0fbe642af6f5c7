"""What a run does when its trainer ranks die, whoever tells it: here the test does, and one process learns."""

import asyncio
import os
import signal
from contextlib import contextmanager

import models
import pytest
from command_line import fails
from defender_runs import CHAPTERS, config_file, metrics, rows_of

from advgame import cli
from advgame.errors import InputError, RanksDied
from advgame.learn.watch import Watch
from advgame.run import commands, loop
from advgame.run.plays import Plays
from advgame.run.recorder import read_trees, tree_files

pytestmark = pytest.mark.slow

RESTARTS = "count/trainer_restarts"


@pytest.fixture
def words(tmp_path):
    run = {"root": str(tmp_path), "purpose": "a test", "steps": 6, "checkpoint_every": 2, "validate_every": 3}
    config = config_file(
        tmp_path,
        models.folder(tmp_path / "player"),
        CHAPTERS,
        run=run | {"deterministic": True},
        data={"harmful": 4, "benign": 4, "validation_limit": 8},
        max_tokens=40,
        game={"responses": 4},
    )
    return ["train", str(config), "--quiet"]


@pytest.fixture
def deaths(monkeypatch):
    """What is still to happen: (stage, step) of a death, or of a stop and a death."""
    plan, watches = [], []
    batch, learn = Plays.batch, loop.learn

    @contextmanager
    def ranks(plan):
        watches.append(Watch())
        yield watches[-1]

    def die(step):
        del plan[0]
        watches[-1].died(RanksDied(f"trainer rank 2 died in step {step}"))

    async def played(self, step):
        if plan and plan[0] == ("stop", step):
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0.1)
        if plan and plan[0] in (("play", step), ("stop", step)):
            die(step)
            await asyncio.sleep(60)
        return await batch(self, step)

    def learned(session, scored, step):
        if plan and plan[0] == ("learn", step):
            die(step)
            watches[-1].check()
        return learn(session, scored, step)

    monkeypatch.setattr(commands, "_ranks", ranks)
    monkeypatch.setattr(Plays, "batch", played)
    monkeypatch.setattr(loop, "learn", learned)
    return plan


def restarts(run):
    return [(row["attempt"], row.get(RESTARTS, 0)) for row in rows_of(run)[:-1]]


def test_a_run_goes_on_from_its_last_checkpoint_or_from_the_start(words, deaths, tmp_path):
    assert cli.main([*words, "--run.name", "whole"]) == 0
    deaths += [("play", 0), ("learn", 3), ("play", 5)]
    assert cli.main([*words, "--run.name", "cut"]) == 0
    assert not deaths
    run = tmp_path / "cut"
    assert metrics(run, RESTARTS) == metrics(tmp_path / "whole", RESTARTS)
    assert restarts(run) == [(1, 1), (1, 1), (2, 2), (2, 2), (3, 3), (3, 3)]
    found = [(one.tree.step, one.tree.index) for file in tree_files(run / "trees") for one in read_trees(file)]
    assert sorted(found) == [(step, i) for step in range(6) for i in range(8)]
    log = (run / "log.txt").read_text()
    for number, (step, since) in enumerate([(0, "the start"), (3, "step-000002"), (5, "step-000004")], 1):
        assert (
            f"trainer rank 2 died in step {step}; restart {number} of 3: new trainer ranks go on from {since}\n" in log
        )


def test_restarts_are_bounded_and_counted_over_resumes(words, deaths, tmp_path, capsys):
    deaths += [("learn", 2), ("learn", 3)]
    assert cli.main([*words, "--run.name", "a", "--cluster.trainer_restarts", "1"]) == 1
    run = tmp_path / "a"
    assert capsys.readouterr().err == (
        "advgame: trainer rank 2 died in step 3; restarts spent: 1 (cluster.trainer_restarts); continue with: advgame "
        f"resume {run}\n"
    )
    deaths += [("play", 5)]
    assert cli.main(["resume", str(run), "--quiet"]) == 0
    assert [count for _, count in restarts(run)] == [0, 0, 0, 0, 1, 1]
    assert len(metrics(run)) == 7


def test_who_wants_to_stop_gets_no_new_ranks(words, deaths, tmp_path):
    deaths += [("stop", 3)]
    assert cli.main([*words, "--run.name", "a"]) == 0
    log = (tmp_path / "a" / "log.txt").read_text()
    assert "trainer rank 2 died in step 3\n" in log
    assert "continue with: advgame resume" in log
    assert "restart 1" not in log


def test_what_a_rank_lacks_ends_the_run(words, tmp_path, capsys, monkeypatch):
    """A rank's InputError is the user's to mend, and no restart would."""

    @contextmanager
    def ranks(plan):
        watch = Watch()
        watch.died(InputError("defender.model: no such folder"))
        yield watch

    monkeypatch.setattr(commands, "_ranks", ranks)
    assert "defender.model: no such folder" in fails(capsys, *words, "--run.name", "a")
    assert not (tmp_path / "a").exists()
