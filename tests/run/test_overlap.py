"""Play ahead of learning, and late trees carried over: repeatability, staleness, resume, no tree lost or doubled."""

import asyncio
import json
import shutil
import time

import models
import pytest
import torch
from command_line import fails
from defender_runs import CHAPTERS, config_file, metrics
from transformers import AutoModelForCausalLM

from advgame import cli
from advgame.config import Config
from advgame.rollout.meter import Meter
from advgame.rollout.transformers_engine import TransformersEngine
from advgame.run import loop, names, verify
from advgame.run.effort import Clock, Totals, step_effort
from advgame.run.recorder import read_trees, tree_files

pytestmark = pytest.mark.slow


@pytest.fixture
def words(tmp_path):
    """A run of a Defender on seeds as they are."""
    run = {"root": str(tmp_path), "purpose": "a test", "steps": 6, "checkpoint_every": 2, "validate_every": 3}
    config = config_file(
        tmp_path,
        models.folder(tmp_path / "player"),
        CHAPTERS,
        run=run | {"threads": 1},
        data={"harmful": 4, "benign": 4, "validation_limit": 8},
        max_tokens=40,
        game={"responses": 4},
    )
    return ["train", str(config), "--quiet"]


def train(words, *more):
    assert cli.main([*words, *map(str, more)]) == 0


def same_weights(a, b, step):
    for name in ("defender", "defender-ema"):
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(run / "checkpoints" / f"step-{step:06d}" / name).state_dict()
            for run in (a, b)
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def places(run):
    """(step, index) of every recorded tree that counts."""
    return [(one.tree.step, one.tree.index) for file in tree_files(run / "trees") for one in read_trees(file)]


def versions(run, step):
    """(tree's step, sample's version) of the samples that a step learned from."""
    return [
        (one.tree.step, response.sample.version)
        for one in read_trees(run / "trees" / f"{step:06d}.jsonl.gz")
        for attack in one.tree.attacks
        for response in attack.responses
    ]


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["rollout", "recompute"])
def test_ahead_is_one_step_stale_and_repeats_and_resumes_bit_for_bit(words, tmp_path, reference):
    ahead = [*words, "--run.ahead", "1", "--learn.reference", reference, "--run.keep_checkpoints", "3"]
    train(ahead, "--run.name", "a")
    train(ahead, "--run.name", "b")
    a, b = tmp_path / "a", tmp_path / "b"
    rows = metrics(a)
    assert rows == metrics(b)
    same_weights(a, b, 6)
    assert [row["play/staleness"] for row in rows[:6]] == [0, 1, 1, 1, 1, 1]
    for step in range(6):
        assert {v for _, v in versions(a, step)} == {max(0, step - 1)}
    # the reference is the version that sampled: in fp32 it agrees with the sampler's numbers
    if reference == "recompute":
        gaps = [row["learn/defender/reference_gap"] for row in rows if "learn/defender/reference_gap" in row]
        assert len(gaps) >= 3
        assert max(gaps) < 1e-3
        assert any(row["learn/defender/grad_norm"] > 0 for row in rows[1:6] if "learn/defender/grad_norm" in row)

    # killed in step 5, after the checkpoint of step 4, which holds the trees that had been played ahead
    held = list(read_trees(b / "checkpoints" / "step-000004" / "trees.jsonl.gz"))
    assert {(one.tree.step, one.tree.index) for one in held} == {(4, i) for i in range(8)}
    shutil.rmtree(b / "checkpoints" / "step-000006")
    (b / "summary.json").unlink()
    assert cli.main(["resume", str(b), "--quiet"]) == 0
    assert metrics(b) == rows
    same_weights(a, b, 6)
    assert sorted(places(b)) == [(step, i) for step in range(6) for i in range(8)]


def test_the_first_step_does_not_depend_on_where_and_when_trees_are_played(words, tmp_path):
    train(words, "--run.name", "a", "--run.steps", 2)
    train(words, "--run.name", "b", "--run.steps", 2, "--run.ahead", 1)
    first, second = ((tmp_path / run / "trees" / "000000.jsonl.gz").read_bytes() for run in "ab")
    assert first == second
    assert versions(tmp_path / "a", 1) != versions(tmp_path / "b", 1)


def test_a_stop_of_ahead_and_its_end_without(words, tmp_path):
    """A batch that was played ahead is learned from once, also when the rest is played in step."""
    train(words, "--run.name", "a", "--run.ahead", 1, "--run.keep_checkpoints", 3)
    run = tmp_path / "a"
    shutil.rmtree(run / "checkpoints" / "step-000006")
    assert cli.main(["resume", str(run), "--quiet", "--run.ahead", "0"]) == 0
    assert [row["play/staleness"] for row in metrics(run)[:6]] == [0, 1, 1, 1, 1, 0]
    assert sorted(places(run)) == [(step, i) for step in range(6) for i in range(8)]


def reference_gaps(run):
    return [row["learn/defender/reference_gap"] for row in metrics(run) if "learn/defender/reference_gap" in row]


@pytest.mark.slow
def test_pairs_refer_to_what_sampled_them_after_any_resume(words, tmp_path):
    """A run's end played nothing ahead, whatever its settings; a checkpoint's trees were, whatever the new ones."""
    ahead = [*words, "--run.ahead", "1", "--learn.reference", "recompute", "--learn.lr", "1e-2"]
    train(ahead, "--run.name", "more", "--run.steps", "4")
    assert cli.main(["resume", str(tmp_path / "more"), "--quiet", "--run.steps", "8"]) == 0
    train(ahead, "--run.name", "less")
    shutil.rmtree(tmp_path / "less" / "checkpoints" / "step-000006")
    assert cli.main(["resume", str(tmp_path / "less"), "--quiet", "--run.ahead", "0"]) == 0
    for name in ("more", "less"):
        assert len(reference_gaps(tmp_path / name)) >= 4
        assert max(reference_gaps(tmp_path / name)) < 1e-3


def test_a_tree_that_fails_while_another_step_learns_ends_the_run(words, monkeypatch):
    """Nobody waits for the next step's trees then; its failure must not be waited for either."""
    generate, learn = TransformersEngine.generate, loop.learn

    async def broken(self, request):
        if request.key[0] == 1:
            raise KeyError("a bug")
        return await generate(self, request)

    def slow(*arguments):
        time.sleep(0.5)
        return learn(*arguments)

    monkeypatch.setattr(TransformersEngine, "generate", broken)
    monkeypatch.setattr(loop, "learn", slow)
    with pytest.raises(BaseExceptionGroup) as failed:
        cli.main([*words, "--run.ahead", "1"])
    assert failed.group_contains(KeyError)


@pytest.mark.parametrize("reference", ["rollout", "recompute"])
def test_samplers_are_verified_ahead_too(words, tmp_path, monkeypatch, reference):
    """The embedded engine in vLLM's place: what is measured, on which trees, and with which length in the limit."""
    monkeypatch.setattr(verify, "Served", TransformersEngine)
    monkeypatch.setattr(verify, "limit", lambda session, tokens: lengths.append(tokens) or 0.02)
    lengths = []
    every = ["--rollout.vllm.verify_every", "1", "--learn.reference", reference]
    train(words, *every, "--run.name", "a", "--run.ahead", "1", "--run.steps", "4")
    rows = metrics(tmp_path / "a")
    gaps = [row["sampler_gap_defender"] for row in rows if "sampler_gap_defender" in row]
    assert len(gaps) >= 3
    assert max(gaps) < 1e-3
    assert len(lengths) == len(gaps)
    assert min(lengths) > 1


@pytest.fixture
def slow_trees(monkeypatch):
    """The real engine, but the last tree of each batch is held back until a later step has begun."""
    generate = TransformersEngine.generate

    async def held_back(self, request):
        step, index, *_ = request.key
        if index == 7 and step < 100:
            await asyncio.sleep(0.5)
        return await generate(self, request)

    monkeypatch.setattr(TransformersEngine, "generate", held_back)


@pytest.mark.parametrize("ahead", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_late_trees_join_the_next_step(words, tmp_path, slow_trees, ahead):
    late = [*words, "--run.deterministic", "false", "--run.carry_over", "0.25", "--learn.reference", "rollout"]
    train(late, "--run.name", "a", "--run.ahead", ahead, "--run.keep_checkpoints", "3")
    run = tmp_path / "a"
    everything = [(step, i) for step in range(6) for i in range(8)]
    assert sorted(places(run)) == everything
    rows = metrics(run)
    assert sum(row[names.LATE_TREES] for row in rows[:6]) >= 3
    for step in range(6):
        for of, version in versions(run, step):
            assert step - 1 <= of <= step
            assert max(0, of - ahead) <= version <= step
    # what was in flight at the checkpoint is played again, once
    state = json.loads((run / "checkpoints" / "step-000004" / "state.json").read_text())
    assert [4 - 1 + ahead, 7] in state["extra"]["owed"]
    shutil.rmtree(run / "checkpoints" / "step-000006")
    assert cli.main(["resume", str(run), "--quiet"]) == 0
    assert sorted(places(run)) == everything
    # and none of it fits other batches
    shutil.rmtree(run / "checkpoints" / "step-000006")
    assert cli.main(["resume", str(run), "--quiet", "--data.harmful", "1"]) == 2


def test_a_late_trees_bug_is_heard_of(words, monkeypatch):
    """A tree that breaks after its step has gone on without it must end the run, not be waited for."""
    generate = TransformersEngine.generate

    async def breaks(self, request):
        step, index, *_ = request.key
        if step == 1 and index == 7:
            await asyncio.sleep(0.2)
            raise ZeroDivisionError("a bug")
        return await generate(self, request)

    monkeypatch.setattr(TransformersEngine, "generate", breaks)
    late = ["--run.deterministic", "false", "--run.carry_over", "0.25", "--learn.reference", "rollout"]
    with pytest.raises(BaseExceptionGroup) as caught:
        cli.main([*words, "--run.name", "a", *late])
    assert caught.group_contains(ZeroDivisionError)


def test_what_does_not_go_together(capsys, words):
    assert "run.carry_over: which trees are late depends on the clock" in fails(
        capsys, *words, "--run.carry_over", "0.1"
    )
    free = [*words, "--run.carry_over", "0.1", "--run.deterministic", "false"]
    assert "set learn.reference: rollout" in fails(capsys, *free)
    assert "run.carry_over" in fails(capsys, *words, "--run.carry_over", "0.6")
    assert "run.ahead" in fails(capsys, *words, "--run.ahead", "2")


def test_effort_by_hand():
    clock = Clock()
    clock._started -= 10.0  # the step has taken ten seconds
    clock.seconds |= {"validate": 2.0, "learn": 3.0, "publish": 1.0}
    meters = {role: Meter() for role in ("attacker", "defender", "judge")}
    for meter, busy in zip(meters.values(), (1.0, 2.0, 5.0), strict=True):
        meter._busy, meter._summed = busy, 4 * busy
    values = step_effort(clock, meters, (5.0, 20), trees=16, game_seconds=6.5)
    assert values[names.HIDDEN_SECONDS] == pytest.approx(2.5)  # 5 + 3 + 1 in 6.5
    assert values[names.TREES_PER_SECOND] == 4.0
    assert values[names.TREES_PER_HOUR] == pytest.approx(3600 * 16 / 8, rel=1e-2)
    assert values[names.engine_seconds("judge")] == 5.0
    assert values[names.request_seconds("judge")] == 20.0
    assert values[names.JUDGE_SHARE] == pytest.approx(5 / 8)
    totals = Totals()
    totals.add(values, 16)
    totals = Totals(json.loads(json.dumps(dict(totals.sums))))
    totals.add(values | {"energy/joules": 1.8e6, "energy/co2e_g": 200.0, "energy/cpu_watts": 90.0}, 16)
    summary = totals.summary()
    assert summary["energy"] == {"joules": 1.8e6, "co2e_g": 200.0}  # power does not add up
    assert summary["judge_share"] == pytest.approx(5 / 8)
    assert summary["engine_seconds"] == {"attacker": 2.0, "defender": 4.0, "judge": 10.0}
    assert summary["trees_per_hour"] == pytest.approx(7200, rel=1e-2)
    assert "engine-seconds attacker 2, defender 4, judge 10; judge's share 62%" in totals.line()
    assert totals.line().endswith("; energy 0.5 kWh, 0.2 kg CO2e")
    without = Totals(
        {
            k: v
            for k, v in totals.sums.items()
            if k not in (names.engine_seconds("judge"), names.request_seconds("judge"))
        }
    )
    assert without.summary()["judge_share"] is None
    assert "judge" not in without.line()
    assert Totals().line() == ""


def test_the_default_is_in_step():
    run = Config().run
    assert (run.ahead, run.carry_over) == (0, 0.0)
