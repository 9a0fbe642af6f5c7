"""Engines on a Ray cluster of several nodes (on this machine), with real vLLM: deaths of actors and nodes, errors.

Every node has one CPU and every engine takes one, so that each stands on a node of its own.
"""

import asyncio
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import engines
import pytest
import torch
from command_line import fails

pytest.importorskip("vllm")
ray = pytest.importorskip("ray")

from advgame import cli  # noqa: E402
from advgame.cluster import ray_cluster  # noqa: E402
from advgame.cluster.settings import ClusterSettings  # noqa: E402
from advgame.publish.collective import CollectiveChannel  # noqa: E402
from advgame.publish.plan import sources_of  # noqa: E402
from advgame.rollout.engine import EngineDied  # noqa: E402
from advgame.rollout.replicas import ReplicaEngine  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
NODES = (1, 1, 1, 1)


@pytest.fixture
def words(tmp_path):
    config = Path(__file__).parents[2] / "configs" / "tiny.yaml"
    few = ["--world.warm_steps", "150", "--data.harmful", "6", "--data.benign", "6", "--run.validate_every", "0"]
    few += ["--game.faithfulness", "false"]  # of players that have learned little, few attacks keep their intent
    vllm = ["--rollout.engine", "vllm", "--rollout.vllm.cache_gib", "0.25", "--rollout.vllm.replicas", "{defender: 2}"]
    placed = ["--run.root", str(tmp_path), "--run.steps", "3", "--cluster", "ray"]
    placed += ["--cluster.silence_s", "20"]  # beside other tests an engine may be slow to answer
    return ["train", str(config), "--quiet", *few, *vllm, *placed]


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_whose_actor_is_killed_loses_no_tree(words, cluster, tmp_path, monkeypatch):
    from advgame.cluster.ray_process import RayProcess
    from advgame.run.recorder import read_trees, tree_files

    monkeypatch.setattr("advgame.run.loop.exact", lambda session: {})
    monkeypatch.setattr("advgame.run.loop.measure", nothing)
    answer, seen, killed = RayProcess.answer, [], []

    async def deadly(self, request, number, sampled):
        seen.append((number.split("-")[0], self))
        if [name for name, _ in seen].count("defender") == 6 and number.startswith("defender"):
            killed.append(self.process_ids)
            os.kill(self.process_ids[0], signal.SIGKILL)
        return await answer(self, request, number, sampled)

    monkeypatch.setattr(RayProcess, "answer", deadly)
    assert cli.main([*words, "--cluster.address", cluster.address, "--run.name", "a"]) == 0
    rows = rows_of(tmp_path / "a")
    found = [one.tree for file in tree_files(tmp_path / "a" / "trees") for one in read_trees(file)]
    assert sorted((tree.step, tree.index) for tree in found) == [(step, i) for step in range(3) for i in range(12)]
    for tree in found:
        samples = [a.sample for a in tree.attacks] + [r.sample for a in tree.attacks for r in a.responses]
        assert {sample.version for sample in samples} == {tree.step}
    assert rows[2]["count/defender_moved"] > 0
    assert rows[2]["count/defender_restarts"] == 1
    assert not {"count/defender_failures", "count/defender_given_up", "count/attacker_restarts"} & rows[2].keys()
    assert all(row["publish/attacker/deliver_ms"] > 0 and row["publish/defender/deliver_ms"] > 0 for row in rows[:3])
    assert len({id(process) for _, process in seen}) >= 3
    assert len(killed) == 1
    assert not any(engines.running(pid) for pid in killed[0]), "the engine core outlived its actor"
    # everything was given back
    give_up = time.monotonic() + 20
    while ray.available_resources().get("CPU") != 4:
        assert time.monotonic() < give_up
        time.sleep(0.1)


async def nothing(session, step):
    return {}


def node_of(engine):
    async def where():
        actor = engine._process._actor
        return await actor.__ray_call__.remote(lambda self: ray.get_runtime_context().get_node_id())

    return where()


def test_a_node_that_dies_is_known_within_five_seconds_and_its_engine_placed_anew(runner, cluster, tmp_path):
    weights, counters = engines.Weights(), Counter()
    settings = engines.settings(transport="collective", publish_timeout_s=60.0, verify_every=1)
    ray_cluster.connect(cluster.address)
    placed = ray_cluster.open_cluster(ClusterSettings(address=cluster.address), {"defender": 2}, 1)
    folder = engines.folder(tmp_path / "m", seed=0)

    def channel():
        how = settings.model_copy(update={"rendezvous_host": placed.host})
        return CollectiveChannel("m", sources_of(weights.now.named_parameters()), torch.device("cpu"), how)

    made = [
        engines.vllm_engine(
            folder, vllm=settings, channel=channel(), restore=weights.restore, counters=counters, replica=i,
            launch=placed.launch("defender", i),
        )
        for i in range(2)
    ]  # fmt: skip
    engine = ReplicaEngine(made)
    runner.run(engine.start())
    try:
        runner.run(engine.publish(1, weights.write))
        before = runner.run(node_of(made[0]))
        assert before != runner.run(node_of(made[1]))
        node = next(n for n in cluster.worker_nodes if n.node_id == before)

        async def play():
            """Requests to both without a pause, until the node's engine is known to be dead."""
            answers, dead = [], asyncio.Event()

            async def persistent(i):
                while not dead.is_set():
                    answers.append(await engine.generate(engines.request((3, 3 + i), i, max_tokens=200)))

            async def on_that_node():
                try:
                    while True:
                        await made[0].generate(engines.request((3, 9), 0, max_tokens=100))
                except EngineDied:
                    return time.perf_counter()

            own, busy = asyncio.create_task(on_that_node()), [asyncio.create_task(persistent(i)) for i in range(8)]
            await asyncio.sleep(0.2)
            killed = time.perf_counter()
            removing = asyncio.get_running_loop().run_in_executor(
                None, lambda: cluster.remove_node(node, allow_graceful=False)
            )
            seconds = await own - killed
            dead.set()
            await asyncio.gather(*busy, removing)
            return seconds, answers

        seconds, answers = runner.run(play())
        assert seconds < 5
        assert len(answers) > 8
        assert {answer.version for answer in answers} == {1}
        assert counters["defender_moved"] > 0
        runner.run(engine.publish(2, weights.write))
        engines.everybody_up(runner, engine)
        assert runner.run(node_of(made[0])) not in (before, runner.run(node_of(made[1])))
        for one in made:
            assert one.version == 2
            engines.assert_serves(runner, one, weights)

        # an actor that says nothing is as good as dead
        os.kill(made[1].process_ids[0], signal.SIGSTOP)
        stopped = time.perf_counter()
        runner.run(engines.until(lambda: not made[1].serving, 10))
        assert time.perf_counter() - stopped < 5
        runner.run(engine.publish(3, weights.write))
        engines.everybody_up(runner, engine)
        for one in made:
            assert one.version == 3
            engines.assert_serves(runner, one, weights)
        assert counters["defender_restarts"] >= 2
    finally:
        runner.run(engine.close())
        placed.close()
        cluster.add_node(num_cpus=1)


def test_too_little_room_names_the_bundle(words, cluster, capsys):
    short = ["--cluster.address", cluster.address, "--cluster.patience_s", "0.5"]
    err = fails(capsys, *words, *short, "--cluster.cpus", "{defender: 2}")
    assert "no room for defender replica 1 (2 CPU); the nodes have" in err
    err = fails(capsys, *words, *short, "--rollout.vllm.replicas", "{defender: 9}")
    assert "cluster: no room for defender replica" in err
    err = fails(capsys, *words, *short, "--cluster.gpus", "{attacker: 1}")
    assert "no room for attacker replica 1 (1 CPU and 1 GPU)" in err
    assert ray.available_resources().get("CPU") == 4


def test_no_cluster(words, capsys, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for address, says in (
        ("127.0.0.1:1", "cluster.address: no Ray cluster at 127.0.0.1:1 (connection refused); start one"),
        ("ray://127.0.0.1:1", "cluster.address: no Ray cluster at ray://127.0.0.1:1 (connection refused); start one"),
        ("somewhere", "cluster.address: somewhere is no address; give auto, local, host:port or ray://host:port"),
    ):
        assert says in fails(capsys, *words, "--cluster.address", address)


def test_ray_missing(words, capsys, monkeypatch):
    monkeypatch.setattr(ray_cluster.importlib.util, "find_spec", lambda name: None)
    assert "cluster.placement: Ray is not installed; install it with: pip install 'advgame[ray]'" in fails(
        capsys, *words
    )
