"""Planning: sizes against transformers' own, the simulation against closed forms, layouts, errors."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from advgame import cli
from advgame.config import build_config
from advgame.errors import InputError
from advgame.plan.assumptions import GIB, H200, Assumptions, calibrate, override
from advgame.plan.command import parse_layout, scale
from advgame.plan.costs import engine_cost, trainer_fit
from advgame.plan.layouts import Cast, Layout, best, candidates, estimate
from advgame.plan.shapes import KNOWN, shape_from_config, shape_of
from advgame.plan.simulate import EngineCost, Replica, Simulation
from advgame.plan.workload import Branch, Lengths, Request, TreeDraw, Workload

CONFIG = Path(__file__).parents[2] / "configs" / "qwen2.5-7b.yaml"
SHAPES = {shape.name: shape for shape in KNOWN}
FLAT = EngineCost(step=lambda active, context: 0.01, prefill=lambda fresh, context: 0.0, most=256)


def published():
    config = build_config(yaml.safe_load(CONFIG.read_text()) | {}, "test")
    assumed = Assumptions()
    cast = Cast(SHAPES["qwen2.5-7b"], SHAPES["qwen2.5-7b"], SHAPES["qwen2.5-32b"])
    how = {"ahead": True, "reference_pass": False, "micro_tokens": 16384, "hardware": H200, "assumed": assumed}
    return config, cast, Workload.of(config, assumed), how


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [Qwen2Config, LlamaConfig])
def test_parameters_are_those_of_the_real_model(kind, tied):
    config = kind(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=160,
        vocab_size=999, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = shape_from_config(json.loads(config.to_json_string(use_diff=False)), "small", "x")
    # norms and biases are vectors; everything else must be counted
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert shape.parameters == matrices


def test_known_shapes_have_their_published_sizes():
    billions = {
        "qwen2.5-0.5b": 0.49,
        "qwen2.5-7b": 7.62,
        "qwen2.5-32b": 32.8,
        "llama3.1-8b": 8.03,
        "llama3.3-70b": 70.6,
    }
    for name, size in billions.items():
        assert SHAPES[name].parameters / 1e9 == pytest.approx(size, rel=0.01)


def test_shape_of_names_the_field_and_the_mend(tmp_path):
    assert shape_of("models/Qwen2.5-7B-Instruct", "attacker.model").name == "qwen2.5-7b"
    with pytest.raises(InputError, match=r"attacker\.model: .*is not a folder here"):
        shape_of("models/somebody", "attacker.model")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"judge\.model: no readable config\.json"):
        shape_of(tmp_path, "judge.model")
    with pytest.raises(InputError, match="mixture of experts"):
        shape_from_config({"num_experts": 8}, "moe", "x")
    with pytest.raises(InputError, match="has no num_hidden_layers"):
        shape_from_config({"num_attention_heads": 8, "hidden_size": 64}, "odd", "x")


def one_stage(*requests: Request) -> TreeDraw:
    return TreeDraw((Branch(None, None, requests, ()),), ())


def test_requests_of_one_replica_advance_together():
    """At a fixed 10 ms a step the batch ends with its longest completion, and the tokens are all there."""
    replicas = {"defender": [Replica("defender", FLAT, 0)]}
    found = Simulation(replicas, driver=0.0).play([one_stage(*(Request("defender", 10, n) for n in (5, 20, 100)))])
    assert found.seconds == pytest.approx(1.0)
    assert found.tokens == {"defender": 125}
    assert found.busy["defender"] == pytest.approx(1.0)


def test_a_step_that_costs_by_request_serves_the_sum():
    """When a step's time is proportional to the batch the machine makes tokens at a fixed rate, whatever the order."""
    cost = EngineCost(step=lambda active, context: 0.01 * active, prefill=lambda fresh, context: 0.0, most=256)
    source = random.Random(3)
    lengths = [source.randrange(1, 200) for _ in range(50)]
    trees = [one_stage(Request("defender", 1, n)) for n in lengths]
    found = Simulation({"defender": [Replica("defender", cost, 0)]}, driver=0.0).play(trees)
    assert found.seconds == pytest.approx(0.01 * sum(lengths), rel=1e-6)


def test_stages_wait_for_each_other_and_branches_do_not():
    request = Request("defender", 1, 100)
    verdict = Request("judge", 1, 100)
    replicas = {"defender": [Replica("defender", FLAT, 0)], "judge": [Replica("judge", FLAT, 1)]}
    tree = TreeDraw((Branch(None, None, (request,), (verdict,)),) * 2, (verdict,))
    assert Simulation(replicas, driver=0.0).play([tree]).seconds == pytest.approx(3.0)


def test_prefill_stalls_its_replica_and_the_cap_makes_waves():
    cost = EngineCost(step=lambda active, context: 0.01, prefill=lambda fresh, context: fresh * 0.001, most=2)
    trees = [one_stage(Request("defender", 100, 100)) for _ in range(4)]
    found = Simulation({"defender": [Replica("defender", cost, 0)]}, driver=0.0).play(trees)
    assert found.seconds == pytest.approx(2 * (1.0 + 0.2))
    cached = [one_stage(Request("defender", 100, 100, cached=100)) for _ in range(4)]
    assert Simulation({"defender": [Replica("defender", cost, 0)]}, 0.0).play(cached).seconds == pytest.approx(2.0)


def test_two_replicas_halve_and_a_shared_gpu_does_not():
    cost = EngineCost(step=lambda active, context: 0.01 * active, prefill=lambda fresh, context: 0.0, most=256)
    trees = [one_stage(Request("defender", 1, 100)) for _ in range(8)]
    own = {"defender": [Replica("defender", cost, 0), Replica("defender", cost, 1)]}
    shared = {"defender": [Replica("defender", cost, 0), Replica("defender", cost, 0)]}
    assert Simulation(own, 0.0).play(trees).seconds == pytest.approx(4.0)
    assert Simulation(shared, 0.0).play(trees).seconds == pytest.approx(8.0)


def test_the_driver_is_one_queue():
    instant = EngineCost(step=lambda active, context: 1e-9, prefill=lambda fresh, context: 0.0, most=256)
    trees = [one_stage(Request("defender", 1, 1)) for _ in range(1000)]
    found = Simulation({"defender": [Replica("defender", instant, 0)]}, driver=1e-3).play(trees)
    assert found.seconds == pytest.approx(1.0, rel=1e-3)
    assert found.driver == pytest.approx(1.0, rel=1e-3)


def test_a_tree_of_the_published_game_asks_eleven_times():
    config, _, work, how = published()
    assert work.requests_per_tree == 11
    assumed, _ = override(H200, how["assumed"], {"valid_share": "1"})[1], None
    trees = Workload.of(config, assumed).draw()
    assert {sum(1 for _ in tree.requests()) for tree in trees} == {11}
    assert work.trees == 64


def test_lengths_keep_their_median_and_their_cut():
    source = random.Random(0)
    drawn = sorted(Lengths(300, 0.6, 2048).draw(source) for _ in range(4001))
    assert drawn[2000] == pytest.approx(300, rel=0.05)
    assert drawn[-1] <= 2048


def test_memory_of_the_published_trainer():
    """Eight ranks, two 7.62 B players: 2 bytes everywhere, 4 unsharded, 16 sharded is too much for stage 1 by hand?"""
    shape = SHAPES["qwen2.5-7b"]
    fit = trainer_fit([shape, shape], 8, 16384, H200, Assumptions())
    assert fit is not None
    assert fit.states == pytest.approx(2 * shape.parameters * (6 + 16 / 8))
    assert fit.stage == 1
    assert trainer_fit([shape, shape], 1, 16384, H200, Assumptions()) is None
    small = trainer_fit([SHAPES["qwen2.5-0.5b"]] * 2, 1, 16384, H200, Assumptions())
    assert small is not None
    assert small.states == 20 * 2 * SHAPES["qwen2.5-0.5b"].parameters


def test_decode_is_bound_by_bytes_at_first_and_by_the_cache_at_last():
    assumed = Assumptions()
    shape = SHAPES["qwen2.5-7b"]
    cost = engine_cost(shape, 1, H200, assumed, tokens=1000)
    assert cost is not None
    floor = 2 * (shape.body_parameters + shape.head_parameters) / (H200.bandwidth.value * assumed.decode_share.value)
    assert cost.step(1, 0) == pytest.approx(floor + assumed.step_overhead.value, rel=1e-3)
    assert cost.step(256, 1000) > cost.step(1, 1000)
    assert engine_cost(SHAPES["qwen2.5-72b"], 1, H200, assumed, tokens=1000) is None


def test_best_is_no_slower_than_the_published_layout():
    _, cast, work, how = published()
    trees = work.draw()
    asked = estimate(Layout(8, 1, 1, 6), cast, work, trees, **how)
    found = best(16, cast, work, trees, **how)
    assert asked is not None
    assert found[0].seconds <= asked.seconds
    assert all(one.layout.gpus == 16 for one in found)
    node = best(8, cast, work, trees, **how)
    assert node
    assert node[0].layout.gpus == 8


def test_one_gpu_serves_small_models_and_refuses_large_ones():
    _, cast, work, how = published()
    small = Cast(SHAPES["qwen2.5-0.5b"], SHAPES["qwen2.5-0.5b"], SHAPES["qwen2.5-1.5b"])
    (only,) = best(1, small, work, work.draw(), **how)
    assert only.layout.shared
    assert only.memory["trainer"] < H200.memory.value
    assert best(1, cast, work, work.draw(), **how) == []


def test_candidates_use_every_gpu():
    for cast_judge, tp in ((SHAPES["qwen2.5-32b"], 1), (SHAPES["llama3.3-70b"], 2), (None, 1)):
        cast = Cast(SHAPES["qwen2.5-7b"], SHAPES["qwen2.5-7b"], cast_judge)
        layouts = list(candidates(16, cast, 8, tp))
        assert layouts
        assert all(layout.gpus == 16 for layout in layouts)


@pytest.mark.slow
def test_scaling_names_what_limits():
    """With a slow driver thousands of GPUs wait for it; with a free one they wait for a model or for training."""
    config, cast, _, how = published()
    slow = override(H200, how["assumed"], {"driver_request": "0.05"})[1]
    rows = scale(Layout(8, 1, 1, 6), cast, config, how | {"assumed": slow})
    assert rows[-1]["limit"] == "play: driver"
    quick = override(H200, how["assumed"], {"driver_request": "1e-9"})[1]
    assert all(
        row["limit"] != "play: driver" for row in scale(Layout(8, 1, 1, 6), cast, config, how | {"assumed": quick})
    )


def test_measured_rates_replace_assumed_ones(tmp_path):
    (tmp_path / "h200.json").write_text(json.dumps({"device": "NVIDIA H200", "copy_bytes_per_s": 4.0e12}))
    (tmp_path / "cpu.json").write_text(json.dumps({"device": "a processor", "copy_bytes_per_s": 1e9}))
    (tmp_path / "broken.json").write_text("{")
    hardware, used = calibrate(H200, tmp_path)
    assert hardware.bandwidth.value == 4.0e12
    assert "h200.json" in hardware.bandwidth.source
    assert used == ["bandwidth from h200.json"]


def test_command_prints_every_assumption_and_writes_json(tmp_path, capsys):
    out = tmp_path / "plan.json"
    words = ["plan", str(CONFIG), "--layout", "8+1+1+6", "--json", str(out), "--run.purpose", "test"]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    tree = json.loads(out.read_text())
    assert tree["layouts"][0]["layout"] == "8+1+1+6"
    for name in tree["assumptions"]:
        assert name in text
    # memory of every layout that is shown
    shown = text.partition("GiB on a GPU")[2].partition("assumptions")[0]
    for one in tree["layouts"]:
        line = next(line for line in shown.splitlines() if line.strip().startswith(one["layout"] + " "))
        assert line.split()[1:5] == [
            f"{one['memory_gib'][role]:.0f}" for role in ("trainer", "attacker", "defender", "judge")
        ]
    assert tree["layouts"][0]["memory_gib"]["trainer"] * GIB > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "--gpus: give 1 or more"),
        (["--layout", "8+1"], "--layout '8+1': write trainer"),
        (["--layout", "8+0+0+8"], "need a GPU each"),
        (["--assume", "nothing=3"], "--assume nothing: unknown; known: train_share"),
        (["--assume", "pause=x"], "--assume pause: 'x' is not a number"),
        (["--assume", "pause"], "write --assume name=value"),
        (["--gpus", "1"], "do not fit on 1 x H200"),
        (["--defender.model", "models/none"], "defender.model: models/none is not a folder here"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys):
    assert cli.main(["plan", str(CONFIG), "--run.purpose", "test", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_tiny_world_needs_no_plan(capsys):
    assert cli.main(["plan", str(CONFIG.parent / "tiny.yaml")]) == 2
    assert "world: the tiny world runs on one CPU core" in capsys.readouterr().err


def test_parse_layout():
    assert parse_layout("8 + 1+1+3x2") == Layout(8, 1, 1, 3, 2)
    assert parse_layout("8+1+1+3x2").gpus == 16
