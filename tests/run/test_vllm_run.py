"""Whole runs whose players sample with real vLLM on the CPU: figures, resume, a judge on vLLM, bad input."""

import json
import socket
from pathlib import Path

import engines
import models
import pytest
from command_line import fails
from defender_runs import SHORT, config_file, rows_of

from advgame import cli
from advgame.rollout import vllm_start


@pytest.fixture
def words(tmp_path):
    """A short run of a Defender on seeds as they are."""
    run = {"root": str(tmp_path), "purpose": "a test", "steps": 4, "checkpoint_every": 2, "validate_every": 0}
    config = config_file(
        tmp_path,
        engines.folder(tmp_path / "player"),
        SHORT,
        run=run | {"threads": 1},
        data={"harmful": 4, "benign": 4, "validation_limit": 8},
        max_tokens=24,
        game={"responses": 6},
        rollout={"engine": "vllm", "vllm": {"max_model_len": 256, "cache_gib": 0.25, "verify_every": 1}},
    )
    return ["train", str(config), "--quiet"]


@pytest.mark.slow
def test_a_run_on_vllm_and_its_resume(words, tmp_path):
    pytest.importorskip("vllm")
    assert cli.main([*words, "--run.name", "a"]) == 0
    run = tmp_path / "a"
    rows = rows_of(run)
    assert [row["step"] for row in rows] == list(range(5))
    for row in rows[:4]:
        assert row["publish/defender/write_ms"] > 0
        assert 0 <= row["sampler_gap_defender"] <= row["sampler_gap_max_defender"] < 1e-3
        assert ("seconds/first_token/defender" in row) == (row["step"] > 0)
        assert not {"count/defender_restarts", "count/defender_sampler_gaps"} & row.keys()
        assert not any(key.endswith("/stale") and value for key, value in row.items())
    # the sampler is the reference: fp32 vLLM and the trainer agree so closely that no reference pass is made
    reference = json.loads((run / "summary.json").read_text())["reference"]["defender"]
    assert all(change < 0.02 for change in reference["changes"])
    assert "does not repeat bit for bit" in (run / "log.txt").read_text()
    # resumed with a limit that no sampler keeps: told and counted
    strict = ["--rollout.vllm.sampler_gap", "1e-12"]
    assert cli.main(["resume", str(run), "--quiet", "--run.steps", "6", *strict]) == 0
    rows = rows_of(run)
    assert [row["step"] for row in rows][-2:] == [5, 6]
    assert [row.get("count/defender_sampler_gaps") for row in rows[3:6]] == [None, 1, 2]
    assert "its samples cannot stand for the reference" in (run / "log.txt").read_text()


@pytest.mark.slow
def test_ahead_with_late_trees_on_vllm(words, tmp_path):
    """Learning in a thread beside the engine's front end; nothing is lost, and every sample says its version."""
    from advgame.run.recorder import read_trees, tree_files

    pytest.importorskip("vllm")
    overlap = ["--run.ahead", "1", "--run.carry_over", "0.25", "--run.deterministic", "false"]
    assert cli.main([*words, "--run.name", "c", *overlap, "--learn.reference", "rollout"]) == 0
    run = tmp_path / "c"
    found = [(int(file.name[:6]), one.tree) for file in tree_files(run / "trees") for one in read_trees(file)]
    assert sorted((tree.step, tree.index) for _, tree in found) == [(step, i) for step in range(4) for i in range(8)]
    for step, tree in found:
        assert step - 1 <= tree.step <= step
        versions = {response.sample.version for attack in tree.attacks for response in attack.responses}
        assert all(max(0, tree.step - 1) <= version <= step for version in versions)
    assert [row["play/staleness"] > 0 for row in rows_of(run)[:4]] == [False, True, True, True]


@pytest.mark.slow
def test_an_engine_that_dies_is_replaced_within_a_run(words, tmp_path, monkeypatch):
    import os
    import signal

    from advgame.rollout.vllm_engine import VllmEngine

    pytest.importorskip("vllm")
    generate, seen = VllmEngine.generate, []

    async def deadly(self, request):
        seen.append(1)
        if len(seen) == 20:
            for pid in self.process_ids:
                os.kill(pid, signal.SIGKILL)
        return await generate(self, request)

    monkeypatch.setattr(VllmEngine, "generate", deadly)
    assert cli.main([*words, "--run.name", "b", "--run.steps", "2"]) == 0
    last = rows_of(tmp_path / "b")[1]
    assert last["count/defender_restarts"] == 1
    assert last["count/defender_failures"] > 0
    assert "count/defender_given_up" not in last


@pytest.mark.slow
def test_a_replica_that_dies_costs_no_tree(words, tmp_path, monkeypatch):
    """Killed in mid-play: every request of its trees is asked of the other one, and both serve the next version."""
    import os
    import signal

    from advgame.rollout.vllm_engine import VllmEngine

    pytest.importorskip("vllm")
    generate, attempt, seen, restarted = VllmEngine.generate, VllmEngine.attempt, [], []

    async def deadly(self, request):
        seen.append(self)
        if len(seen) == 100:  # of 48 a step, with one validation of 8 before
            for pid in self.process_ids:
                os.kill(pid, signal.SIGKILL)
        return await generate(self, request)

    async def watched(self, *arguments):
        restarted.append(self.counters["defender_restarts"])
        return await attempt(self, *arguments)

    monkeypatch.setattr(VllmEngine, "generate", deadly)
    monkeypatch.setattr(VllmEngine, "attempt", watched)
    two = ["--rollout.vllm.replicas", "{defender: 2}", "--run.steps", "6"]
    assert cli.main([*words, "--run.name", "d", *two]) == 0
    rows = rows_of(tmp_path / "d")
    assert_every_tree_once(tmp_path / "d", steps=6, trees=8)
    assert rows[5]["count/defender_restarts"] == 1
    assert rows[5]["count/defender_moved"] > 0
    assert not {"count/defender_failures", "count/defender_given_up", "count/defender_lost"} & rows[5].keys()
    for row in rows[:6]:
        assert row["publish/defender/write_ms"] > 0
        assert not any(key.endswith("/stale") and value for key, value in row.items())
    assert len({id(engine) for engine in seen[:20]}) == 2
    assert all(row.get("sampler_gap_defender", 0) < 1e-3 for row in rows)


def assert_every_tree_once(run, *, steps, trees):
    """From the recorder's files: each (step, index) once, every sample from the weights of its step, in full."""
    from advgame.run.recorder import read_trees, tree_files

    found = [one.tree for file in tree_files(run / "trees") for one in read_trees(file)]
    assert sorted((tree.step, tree.index) for tree in found) == [(s, i) for s in range(steps) for i in range(trees)]
    for tree in found:
        samples = [response.sample for attack in tree.attacks for response in attack.responses]
        assert len(samples) == 6
        assert {sample.version for sample in samples} == {tree.step}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_players_and_the_worlds_judge_on_vllm(tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    monkeypatch.setattr("advgame.run.loop.exact", lambda session: {})
    monkeypatch.setenv("ADVGAME_CACHE", str(tmp_path / "cache"))
    config = Path(__file__).parents[2] / "configs" / "tiny-judge.yaml"
    few = ["--world.warm_steps", "150", "--world.judge_steps", "150", "--data.harmful", "6", "--data.benign", "6"]
    placed = ["--run.root", str(tmp_path), "--run.name", "c", "--run.steps", "2", "--run.validate_every", "0"]
    assert cli.main(["train", str(config), "--quiet", "--rollout.engine", "vllm", *few, *placed]) == 0
    played = rows_of(tmp_path / "c")
    assert 0 <= played[0]["eval/judge_agreement_no_verdict"] < 0.2
    assert 0 < played[0]["eval/judge_agreement_exact"] <= 1
    for row in played[:2]:
        assert 0 <= row["play/judge_cached_share"] < 1
        assert 3 <= row["play/judge_tokens"] <= 16
        assert row["publish/attacker/write_ms"] > 0
        assert row["publish/defender/write_ms"] > 0
        assert not any(key.endswith("_given_up") for key in row)
    assert "judge_cached_share" in json.loads((tmp_path / "c" / "summary.json").read_text())


def test_bad_input(capsys, words, monkeypatch, tmp_path):
    monkeypatch.setattr(vllm_start, "vllm_version", lambda field: "0.32.0")
    monkeypatch.setattr(vllm_start, "on_cpu", lambda: True)
    small = models.folder(tmp_path / "small")
    assert "defender.model: vLLM on the CPU has no attention for heads of size 8" in fails(
        capsys, *words, "--defender.model", str(small)
    )
    assert "rollout.vllm.tensor_parallel: 3 does not divide" in fails(
        capsys, *words, "--rollout.vllm.tensor_parallel", "3"
    )
    assert "rollout.vllm.transport: ipc needs GPUs, and torch sees none here; set shm" in fails(
        capsys, *words, "--rollout.vllm.transport", "ipc"
    )
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        collective = ["--rollout.vllm.transport", "collective", "--rollout.vllm.rendezvous_port", port]
        assert f"rollout.vllm.rendezvous_port: port {port} is taken; give a free one" in fails(
            capsys, *words, *collective
        )
    quantised = engines.folder(tmp_path / "quantised")
    settings = json.loads((quantised / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (quantised / "config.json").write_text(json.dumps(settings))
    assert "quantised holds quantised weights (gptq), and players train and publish plain ones; give the" in fails(
        capsys, *words, "--defender.model", str(quantised)
    )
    llm = ["--judge.kind", "llm", "--judge.endpoint"]
    assert "judge.endpoint.url: 'somewhere' is no address" in fails(capsys, *words, *llm, "{url: somewhere, model: m}")
    assert "judge.endpoint: only an llm judge asks a server" in fails(
        capsys, *words, "--judge.endpoint", "{url: somewhere, model: m}"
    )


def test_vllm_missing(capsys, words, monkeypatch):
    import importlib.metadata

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert "rollout.engine: vLLM is not installed; install it with: pip install 'advgame[vllm]'" in fails(
        capsys, *words
    )
