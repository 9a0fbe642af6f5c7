"""Simulation told by measured runs: costs are found again, another layout is foretold, bad input is one line."""

import json
import random
import shutil

import pytest
from command_line import fails
from run import tree_samples

from advgame import cli
from advgame.config import build_config
from advgame.game.rewards import TreeRewards
from advgame.game.tree import Category
from advgame.plan.like import STAGES, Costs, Measured, Step, draw_of, fit, line, predict, read_run, simulate
from advgame.plan.simulate import EngineCost, Replica, Simulation
from advgame.plan.workload import Branch, Request, TreeDraw
from advgame.run import names
from advgame.run.recorder import write_trees

TRUE = Costs(step=4e-3, row=3e-4, prefill=8e-4, driver=9e-4)


def settings(seeds, defenders=1, **more):
    rollout = {"engine": "vllm", "vllm": {"replicas": {"defender": defenders}}}
    return build_config(
        {"world": {}, "data": {"harmful": seeds, "benign": seeds}, "judge": {"kind": "rule"}, "rollout": rollout}
        | more,
        "test",
    )


def drawn(count, seed):
    """Trees as the tiny world plays them: two attacks, most of them answered twice."""
    source = random.Random(seed)

    def branch():
        answers = (
            tuple(Request("defender", 20, source.randint(5, 24)) for _ in range(2)) if source.random() < 0.8 else ()
        )
        return Branch(Request("attacker", 30, source.randint(10, 40)), None, answers, ())

    return [TreeDraw((branch(), branch()), ()) for _ in range(count)]


def measured(seeds, *, defenders=1, cores=2, noise=0.0, path="run"):
    """What a run would say of itself if the simulation were the truth."""
    replicas, steps = {"attacker": 1, "defender": defenders}, []
    source = random.Random(seeds)
    for number in range(6):
        trees = drawn(2 * seeds, seeds + 100 * number)
        made = simulate(trees, TRUE, replicas, cores, 256)
        seconds = {"play": made.seconds * source.uniform(1 - noise, 1 + noise), "learn": 0.02 + 0.004 * seeds}
        categories = [tuple(Category)[i % 2] for i in range(2 * seeds)]
        steps.append(Step(trees, categories, seconds | {"publish": 0.03, "rest": 0.002 * seeds}, made.waited))
    return Measured(
        path, "local", replicas, cores, 256, steps, TRUE.driver, {"attacker": (0.01, 0.004), "defender": (0.02, 0.008)}
    )


def test_a_layout_that_was_not_measured_is_foretold():
    """From one Defender and two batches to two Defenders and a third, with five percent of noise on the clock."""
    runs = [measured(4, noise=0.05), measured(16, noise=0.05)]
    costs, error = fit(runs)
    assert error < 0.08
    assert costs.step + 10 * costs.row == pytest.approx(TRUE.step + 10 * TRUE.row, rel=0.15)
    made = predict(settings(10, 2), runs, costs)
    true = measured(10, defenders=2)
    play = sum(step.seconds["play"] for step in true.steps) / len(true.steps)
    assert made.seconds["play"] == pytest.approx(play, rel=0.1)
    assert made.seconds["learn"] == pytest.approx(0.06)
    assert made.seconds["publish"] == pytest.approx(0.01 + 0.02 + 0.008)
    assert tuple(made.seconds) == STAGES


def test_cores_are_shared_by_whoever_works():
    cost = EngineCost(lambda active, context: 0.01, lambda fresh, context: 0.0, 256)
    trees = [TreeDraw((Branch(None, None, (Request(role, 1, 100),), ()),), ()) for role in ("attacker", "defender")]

    def seconds(cores):
        replicas = {role: [Replica(role, cost, 0)] for role in ("attacker", "defender", "judge")}
        return Simulation(replicas, 0.0, cores).play(trees).seconds

    assert seconds(1) == pytest.approx(2.0)
    assert seconds(2) == seconds(3) == pytest.approx(1.0)


def test_the_driver_slows_with_the_cores_and_requests_wait_for_it():
    cost = EngineCost(lambda active, context: 1e-9, lambda fresh, context: 0.0, 256)
    trees = [TreeDraw((Branch(None, None, (Request("defender", 1, 1),), ()),), ()) for _ in range(10)]
    made = Simulation({"defender": [Replica("defender", cost, 0)]}, 0.1, cores=1).play(trees)
    assert made.seconds == pytest.approx(1.0, rel=1e-3)
    assert made.waited["defender"] == pytest.approx(0.1 * sum(range(1, 11)), rel=1e-3)


def test_a_recorded_tree_as_requests():
    answered = tree_samples.attack(responses=[tree_samples.response(), tree_samples.response(tokens=(1, 2, 3))])
    tree = tree_samples.tree(attacks=[answered, tree_samples.attack(prompt=None, tokens=(5,) * 7)])
    first, second = draw_of(tree, 0, settings(1)).branches
    assert (first.attack, first.faithful) == (Request("attacker", 2, 2), None)
    assert first.answers == (Request("defender", 2, 2), Request("defender", 2, 3))
    assert (second.attack, second.answers) == (Request("attacker", 2, 7), ())
    assert draw_of(tree, 5, settings(1)).branches[0].faithful == Request("judge", 0, 5)


def test_lines():
    assert line([(8, 1.0), (8, 3.0)], 16) == 4.0
    assert line([(8, 1.0), (16, 2.0)], 12) == pytest.approx(1.5)


@pytest.fixture
def run(tmp_path):
    """The folder of a run of five steps."""
    folder = tmp_path / "run"
    (folder / "trees").mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(settings(1).model_dump(mode="json")))
    (folder / "environment.json").write_text(json.dumps({"starts": [{"cpu_count": 3}]}))
    rows = []
    for step in range(5):
        answers = [tree_samples.response(tokens=(1,) * 9)] * 2
        trees = [tree_samples.tree("harmful", [tree_samples.attack(responses=answers, tokens=(1,) * 20)], step=step),
                 tree_samples.tree("benign", [tree_samples.attack(responses=answers)], step=step, index=1)]  # fmt: skip
        rewards = [TreeRewards((0.0,), ((0.0, 1.0),))] * 2
        write_trees(folder / "trees" / f"{step:06d}.jsonl.gz", trees, rewards)
        row = {"step": step, names.STEP_SECONDS: 1.0, names.PROCESS_SECONDS: 0.6}
        row |= {names.stage_seconds(stage): value for stage, value in (("play", 0.5), ("learn", 0.3), ("publish", 0.1))}
        row |= {names.request_seconds(role): 1.0 for role in names.ROLES}
        parts = ("quiesce", "write", "deliver", "reset", "stamp", "resume")
        rows.append(row | {f"publish/{role}/{part}_ms": 5.0 for role in names.ROLES for part in parts})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_what_a_run_says(run):
    found = read_run(run)
    assert (found.cores, found.replicas, len(found.steps)) == (3, {"attacker": 1, "defender": 1}, 3)
    assert found.steps[0].seconds["rest"] == pytest.approx(0.1)
    # 0.6 s of the processor, less learning, publishing and the rest, over six requests
    assert found.driver == pytest.approx(0.1 / 6)
    assert found.publishes["defender"] == pytest.approx((0.03, 0.005))
    assert read_run(run, cores=2).cores == 2


def test_the_command(run, capsys, tmp_path):
    two = ["--rollout.vllm.replicas", "{defender: 2}", "--data.harmful", "3"]
    words = ["plan", str(run / "config.yaml"), "--simulate", "--like", str(run), "--json", str(tmp_path / "p.json")]
    assert cli.main([*words, *two]) == 0
    out = capsys.readouterr().out
    assert "3 cores; a decode step" in out
    assert "attacker 1 defender 2" in out
    made = json.loads((tmp_path / "p.json").read_text())
    assert made["prediction"]["total"] == pytest.approx(sum(made["prediction"]["seconds"].values()))


def test_a_run_on_ray(run, capsys):
    """Is taken for a config that Ray places, and for no other."""
    config = json.loads((run / "config.yaml").read_text())
    config["cluster"]["placement"] = "ray"
    (run / "config.yaml").write_text(json.dumps(config))
    words = ["plan", str(run / "config.yaml"), "--simulate", "--like", str(run)]
    assert cli.main([*words, "--rollout.vllm.replicas", "{defender: 2}"]) == 0
    assert "attacker 1 defender 2" in capsys.readouterr().out
    err = fails(capsys, *words, "--cluster.placement", "local")
    assert "cluster: it was played on ray, and" in err
    assert "is to be on local; give a run that was placed alike, or set cluster.placement" in err


def test_bad_input(run, capsys, tmp_path):
    config = run / "config.yaml"
    assert "not a run folder (no config.yaml)" in fails(capsys, "plan", config, "--like", tmp_path)
    plain = fails(capsys, "plan", config, "--like", run, "--rollout.engine", "transformers")
    assert "rollout.engine: only vLLM's engines are simulated" in plain
    assert "steps that overlap" in fails(capsys, "plan", config, "--like", run, "--run.ahead", "1")
    assert "--cores: give 1 or more" in fails(capsys, "plan", config, "--like", run, "--cores", "0")
    short = shutil.copytree(run, tmp_path / "short")
    rows = (short / "metrics.jsonl").read_text().splitlines(keepends=True)
    (short / "metrics.jsonl").write_text("".join(rows[:3]))
    assert "3 steps are too few; give a run of 4 or more" in fails(capsys, "plan", config, "--like", short)
