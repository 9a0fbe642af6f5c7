"""Trainer ranks as Ray actors of several nodes (on this machine): the process that was started leads and holds no
shard; a rank's death costs the steps since the last checkpoint and nothing else."""

import asyncio
import json
import os
import signal
import threading
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import engines
import models
import pytest
import torch
from command_line import fails
from transformers import AutoModelForCausalLM

pytest.importorskip("vllm")
pytest.importorskip("deepspeed")
ray = pytest.importorskip("ray")

from advgame import cli  # noqa: E402
from advgame.cluster import ray_cluster, ray_process, ray_ranks  # noqa: E402
from advgame.cluster.settings import ClusterSettings  # noqa: E402
from advgame.config import load_config  # noqa: E402
from advgame.errors import InputError, RanksDied  # noqa: E402
from advgame.game.pairs import Role  # noqa: E402
from advgame.game.rewards import RewardRules, tree_rewards  # noqa: E402
from advgame.learn import zero_learner  # noqa: E402
from advgame.learn.learner import Learner  # noqa: E402
from advgame.learn.settings import LearnSettings  # noqa: E402
from advgame.learn.streams import SideBySide  # noqa: E402
from advgame.learn.zero_learner import DeepSpeedLearner  # noqa: E402
from advgame.rollout.chat import load_tokenizer  # noqa: E402
from advgame.rollout.transformers_engine import TransformersEngine  # noqa: E402
from advgame.run import loop  # noqa: E402
from advgame.run.recorder import read_trees, tree_files  # noqa: E402
from advgame.run.session import Side  # noqa: E402
from advgame.world.world import open_world  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]  # many processes; ten minutes on two slow, busy cores
NODES = (2, 2, 2)
TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
SHORT = {
    "world.warm_steps": 150, "world.judge_steps": 150, "data.harmful": 6, "data.benign": 6,
    "game.faithfulness": "false",  # of players that have learned little, few attacks keep their intent
    "run.validate_every": 0, "run.tensorboard": "false",
    "learn.lr_final": 1.0, "learn.reference": "recompute", "attacker.lr": 3e-4, "defender.lr": 3e-4,
}  # fmt: skip
VLLM = {"rollout.engine": "vllm", "rollout.vllm.cache_gib": 0.25}
RANKS = {"learn.backend": "deepspeed", "cluster.trainer_ranks": 2, "cluster.placement": "ray", "cluster.silence_s": 20}


async def nothing(session, step):
    return {}


@pytest.fixture
def advgame(tmp_path, cluster, monkeypatch):
    """The exit code of a run of so many steps, without the long evaluation of its start and end."""
    monkeypatch.setattr(loop, "examine_judge", lambda session: nothing(session, 0))
    monkeypatch.setattr(loop, "measure", nothing)

    def run(name, steps, *settings):
        more = {"run.root": tmp_path, "run.name": name, "run.steps": steps}
        if any("cluster.placement" in one for one in settings):
            more["cluster.address"] = cluster.address
        merged = {key: value for one in (SHORT, *settings, more) for key, value in one.items()}
        words = [word for key, value in merged.items() for word in (f"--{key}", str(value))]
        return cli.main(["train", str(TINY), "--quiet", *words])

    return run


@pytest.fixture
def started(monkeypatch):
    """Every start of ranks and when it was, and the processes of every start of an engine."""
    found = SimpleNamespace(ranks=[], times=[], engines=[])
    ranks, engine = ray_ranks.RayRanks.__init__, ray_process.RayProcess.__init__

    def rank_start(self, *arguments):
        found.ranks.append(self)
        found.times.append(time.monotonic())
        ranks(self, *arguments)

    def engine_start(self, *arguments):
        engine(self, *arguments)
        found.engines.append(self.process_ids)

    monkeypatch.setattr(ray_ranks.RayRanks, "__init__", rank_start)
    monkeypatch.setattr(ray_process.RayProcess, "__init__", engine_start)
    return found


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trees_of(run):
    return {int(file.name[:6]): list(read_trees(file)) for file in tree_files(run / "trees")}


def assert_every_tree_once(run, steps):
    found = trees_of(run)
    assert list(found) == list(range(steps))
    for step, recorded in found.items():
        assert sorted((one.tree.step, one.tree.index) for one in recorded) == [(step, i) for i in range(12)]


def assert_nothing_is_left(started):
    """No process of a rank or an engine, no reserved CPU."""
    ids = [pid for ranks in started.ranks for pid in ranks.process_ids] + [
        pid for ids in started.engines for pid in ids
    ]
    give_up = time.monotonic() + 20
    while any(map(engines.running, ids)) or ray.available_resources().get("CPU") != sum(NODES):
        assert time.monotonic() < give_up, ([pid for pid in ids if engines.running(pid)], ray.available_resources())
        time.sleep(0.1)


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_learned_as_one_process(run, steps):
    """A plain learner in this process, given the run's own trees, measures and ends as the ranks did."""
    config = load_config(run / "config.yaml", ["--learn.backend", "plain", "--cluster.placement", "local",
                                               "--cluster.trainer_ranks", "null"])  # fmt: skip
    world = open_world(config.world)
    sides = []
    for name, role in (("attacker", Role.ATTACKER), ("defender", Role.DEFENDER)):
        folder = getattr(world, f"{name}_path")
        made = Learner(folder, load_tokenizer(folder, name), config.learn, field=name, lr=getattr(config, name).lr)
        sides.append(Side(name, (role,), None, made))
    abreast = SideBySide(torch.device("cpu"), allowed=False)
    session = SimpleNamespace(config=config, sides=sides, abreast=abreast)
    served = {side.name: {n: torch.empty_like(p) for n, p in side.learner.published.items()} for side in sides}
    packed = ("tokens", "tokens_saved", "reference_change")
    rules, rows, found = RewardRules(config.game.attacker_judge, config.game.optimistic), rows_of(run), trees_of(run)
    for step in range(steps):
        trees = [one.tree for one in found[step]]
        expected = loop.learn(session, [(tree, tree_rewards(tree, rules)) for tree in trees], step)
        for name, value in expected.items():
            if name.split("/")[-1] not in packed:
                assert rows[step][name] == pytest.approx(value, rel=1e-4, abs=1e-4), (step, name)
        assert all(expected[f"learn/{side.name}/pairs"] > 0 for side in sides)
        for side in sides:
            side.learner.publish_into(served[side.name])
    checkpoint = run / "checkpoints" / f"step-{steps:06d}"
    for side in sides:
        live = dict(side.learner.model.named_parameters())
        for folder, ours in ((side.name, live), (f"{side.name}-ema", served[side.name])):
            theirs = weights(checkpoint / folder)
            assert all(torch.allclose(theirs[key], ours[key], atol=1e-4, rtol=0) for key in ours), folder


def test_a_run_of_ranks_replicas_and_a_judge_on_ray_is_the_run_of_one_process(advgame, started, tmp_path, monkeypatch):
    """Two ranks, two Defenders, an Attacker and the world's own judge. Play differs by the sampler's random numbers: so
    what is learned of the run's own trees is compared exactly, and the figures of the end within three times what the
    seeds 0 to 3 of one process differ by (0.023, 0.015, 0.017)."""

    async def exactly(session, step):
        return loop.exact(session)

    monkeypatch.setattr(loop, "measure", exactly)
    llm = {"judge.kind": "llm", "run.checkpoint_every": 0}
    assert advgame("one", 3, llm) == 0
    placed = {"rollout.vllm.replicas": "{defender: 2}", "learn.deepspeed.stage": 2}
    assert advgame("ray", 3, llm, VLLM, RANKS, placed) == 0
    assert len(started.ranks) == 1
    assert len({*started.ranks[0].process_ids, os.getpid()}) == 3
    assert len(started.engines) == 4
    assert_nothing_is_left(started)
    assert_every_tree_once(tmp_path / "ray", 3)
    assert_learned_as_one_process(tmp_path / "ray", 3)
    one, many = rows_of(tmp_path / "one"), rows_of(tmp_path / "ray")
    assert [row["step"] for row in many] == list(range(4))
    assert "count/trainer_restarts" not in many[-2]
    for name, most in {"exploitability_bound": 0.07, "worst_over_refusal": 0.045, "gibberish": 0.05}.items():
        assert many[0][f"eval/{name}"] == pytest.approx(one[0][f"eval/{name}"], abs=1e-6), name
        assert abs(many[3][f"eval/{name}"] - one[3][f"eval/{name}"]) < most, name


def test_a_rank_killed_in_an_update_costs_the_steps_since_the_checkpoint(
    advgame, started, tmp_path, monkeypatch, capfd
):
    """A Defender on vLLM, trained by two ranks; one of them is stopped, so that the update cannot end, and killed."""
    update, died, killed = DeepSpeedLearner.update_pairs, [], []

    def kill():
        killed.append(time.monotonic())
        os.kill(started.ranks[0].process_ids[1], signal.SIGKILL)

    def deadly(self, pairs, progress):
        if self.updates == 6 and not killed:  # two a step: in step 3, of which no checkpoint knows
            os.kill(started.ranks[0].process_ids[1], signal.SIGSTOP)
            threading.Timer(0.3, kill).start()
        try:
            return update(self, pairs, progress)
        except RanksDied as error:
            died.append((time.monotonic(), str(error)))
            raise

    monkeypatch.setattr(DeepSpeedLearner, "update_pairs", deadly)
    alone = {"game.skip_attacker": "true", "run.checkpoint_every": 2}
    assert advgame("a", 5, alone, VLLM, RANKS, {"learn.deepspeed.stage": 3}) == 0
    run = tmp_path / "a"
    ((when, words),) = died
    assert when - killed[0] < 5
    assert words.startswith("trainer rank 2 died (")
    rows = rows_of(run)
    assert [row["step"] for row in rows] == list(range(6))
    assert [row["attempt"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert [row.get("count/trainer_restarts") for row in rows[:5]] == [None, None, 1, 1, 1]
    aside = (run / "metrics.attempt0.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in aside] == [2]
    assert_every_tree_once(run, 5)
    assert f"{words}; restart 1 of 3: new trainer ranks go on from step-000002\n" in (run / "log.txt").read_text()
    assert len(json.loads((run / "environment.json").read_text())["starts"]) == 2
    assert len(started.ranks) == len(started.engines) == 2
    assert_nothing_is_left(started)


def test_a_node_that_dies_before_any_checkpoint_and_a_rank_that_fails(
    advgame, started, cluster, tmp_path, monkeypatch, capfd
):
    """A player on each rank, sampled by the driver: a node's death is known while play goes on, and the run starts
    again on other nodes; when a rank fails no restart is left, and one process goes on from the checkpoint."""
    generate, killed = TransformersEngine.generate, []

    async def deadly(self, request):
        if not killed:
            killed.append(time.monotonic())
            node = next(n for n in cluster.worker_nodes if n.node_id == node_of(started.ranks[0]))
            remove = partial(cluster.remove_node, node, allow_graceful=False)
            await asyncio.get_running_loop().run_in_executor(None, remove)
        if len(started.ranks) == 1:
            await asyncio.sleep(100)
        return await generate(self, request)

    monkeypatch.setattr(TransformersEngine, "generate", deadly)
    apart = {"learn.deepspeed.stage": 1, "learn.deepspeed.attacker_ranks": 1, "cluster.trainer_restarts": 1}
    words = zero_learner.pairs_message
    update = DeepSpeedLearner.update_pairs

    def failing(self, pairs, progress):
        if self.updates == 4:
            monkeypatch.setattr(zero_learner, "pairs_message", lambda pairs: [{}])
        return update(self, pairs, progress)

    monkeypatch.setattr(DeepSpeedLearner, "update_pairs", failing)
    assert advgame("a", 3, RANKS, apart, {"run.checkpoint_every": 2}) == 1
    cluster.add_node(num_cpus=NODES[0])
    run = tmp_path / "a"
    log, err = (run / "log.txt").read_text(), capfd.readouterr().err.splitlines()[-1]
    assert started.times[1] - killed[0] < 10
    assert "trainer rank 1 died (" in log
    assert "; restart 1 of 1: new trainer ranks go on from the start\n" in log
    assert err.startswith("advgame: trainer rank ")
    assert err.endswith(
        f": KeyError: 'chosen'; restarts spent: 1 (cluster.trainer_restarts); continue with: advgame resume {run}"
    )
    assert_nothing_is_left(started)
    assert [(row["step"], row["attempt"]) for row in rows_of(run)] == [(0, 1), (1, 1)]
    assert_learned_as_one_process(run, 2)
    monkeypatch.setattr(zero_learner, "pairs_message", words)
    plain = "--learn.backend plain --cluster.placement local --cluster.trainer_ranks null"
    assert cli.main(["resume", str(run), "--quiet", *plain.split(), "--learn.deepspeed.attacker_ranks", "null"]) == 0
    assert [(row["step"], row["attempt"]) for row in rows_of(run)] == [(0, 1), (1, 1), (2, 2), (3, 2)]
    assert rows_of(run)[2]["count/trainer_restarts"] == 1
    assert_every_tree_once(run, 3)


def node_of(ranks):
    """Of the first one."""
    return ray.get(ranks._actors[0].__ray_call__.remote(lambda self: ray.get_runtime_context().get_node_id()))


def test_a_rank_that_says_nothing_is_as_good_as_dead(cluster, started):
    ray_cluster.connect(cluster.address)
    settings = ClusterSettings(address=cluster.address, trainer_ranks=2, silence_s=2)
    with closing(ray_cluster.open_cluster(settings, {}, 1)) as placed, ray_ranks.led(placed, None, 1) as watch:
        watch.check(1.0)
        os.kill(started.ranks[0].process_ids[1], signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(RanksDied, match="trainer rank 2 has said nothing for 2 s"):
            watch.check(20)
        assert time.monotonic() - began < 5
    assert_nothing_is_left(started)


def test_a_rank_that_is_killed_while_it_writes_a_checkpoint_is_known(cluster, started, tmp_path):
    """What it cannot write (a pipe that nobody reads) is waited for until it dies."""
    ray_cluster.connect(cluster.address)
    player = models.folder(tmp_path / "player")
    settings = ClusterSettings(address=cluster.address, trainer_ranks=2, silence_s=20)
    with closing(ray_cluster.open_cluster(settings, {}, 1)) as placed, ray_ranks.led(placed, None, 1):
        learner = DeepSpeedLearner(
            player, models.tokenizer(), LearnSettings(backend="deepspeed"), field="attacker.model"
        )
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        os.mkfifo(folder / ".part-attacker-00002-of-00002.json")
        wait = learner.write(folder, "attacker", beside=True)
        threading.Timer(0.5, os.kill, (started.ranks[0].process_ids[1], signal.SIGKILL)).start()
        began = time.monotonic()
        with pytest.raises(RanksDied, match="trainer rank 2 died"):
            wait()
        assert time.monotonic() - began < 10
    assert_nothing_is_left(started)


def test_too_little_room_names_the_rank(cluster, capsys):
    words = ["train", TINY, "--quiet", "--cluster.address", cluster.address, "--cluster.patience_s", "0.5"]
    words += [word for key, value in RANKS.items() for word in (f"--{key}", value)]
    err = fails(capsys, *words, "--cluster.cpus", "{trainer: 3}")
    assert "cluster: no room for trainer rank 1 (3 CPU); the nodes have" in err
    assert "lower rollout.vllm.replicas, cluster.trainer_ranks, cluster.cpus" in err
    assert "no room for trainer rank 7" in fails(capsys, *words, "--cluster.trainer_ranks", "7")
    assert ray.available_resources().get("CPU") == sum(NODES)


def test_what_a_rank_raises_is_told():
    """What the user has to mend ends the run, whatever is left of the restarts."""

    def told(cause):
        return ray_ranks._as_told("trainer rank 1", ray.exceptions.RayTaskError("follow", "a traceback", cause))

    missing = told(ModuleNotFoundError("No module named 'deepspeed'"))
    assert isinstance(missing, InputError)
    assert "a node has No module named 'deepspeed'; install advgame[deepspeed] on every node" in str(missing)
    given = told(InputError("defender.model: no such folder"))
    assert (type(given), str(given)) == (InputError, "defender.model: no such folder")
    failed = told(RuntimeError("CUDA out of\n memory"))
    assert (type(failed), str(failed)) == (RanksDied, "trainer rank 1: RuntimeError: CUDA out of memory")
