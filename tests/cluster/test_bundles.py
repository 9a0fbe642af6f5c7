"""What engines ask of a cluster, who finds no room, and settings that do not go with Ray; no Ray is needed here."""

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import fails

from advgame.cluster.bundles import Bundle, bundles_of, first_unplaced
from advgame.cluster.settings import ClusterSettings
from advgame.config import build_config
from advgame.errors import InputError
from advgame.learn.zero_config import check_backend
from advgame.run.engines import replicas_of


def test_bundles_of_every_replica():
    settings = ClusterSettings(cpus={"judge": 4}, gpus={"attacker": 0.5})
    made = bundles_of(settings, {"attacker": 1, "defender": 2, "judge": 1}, 2, gpus=True)
    assert [(b.engine, b.replica, b.cpus, b.gpus) for b in made] == [
        ("attacker", 0, 1, 0.5), ("defender", 0, 1, 2), ("defender", 1, 1, 2), ("judge", 0, 4, 2)
    ]  # fmt: skip
    assert str(made[2]) == "defender replica 2 (1 CPU and 2 GPU)"
    assert bundles_of(settings, {"judge": 1}, 2, gpus=False)[0].resources == {"CPU": 4}


def test_bundles_of_trainer_ranks():
    """A GPU each where the cluster has any, whatever an engine takes."""
    made = bundles_of(ClusterSettings(trainer_ranks=2, cpus={"trainer": 3}), {"defender": 1}, 2, gpus=True)
    assert [(b.engine, b.replica, b.cpus, b.gpus) for b in made] == [
        ("trainer", 0, 3, 1), ("trainer", 1, 3, 1), ("defender", 0, 1, 2)
    ]  # fmt: skip
    assert str(made[1]) == "trainer rank 2 (3 CPU and 1 GPU)"
    assert bundles_of(ClusterSettings(trainer_ranks=1), {}, 2, gpus=False)[0].resources == {"CPU": 1}


@pytest.mark.parametrize(
    ("nodes", "missing"),
    [
        ([{"CPU": 3, "GPU": 3}], None),
        ([{"CPU": 1, "GPU": 2}, {"CPU": 1, "GPU": 1}, {"CPU": 1}], None),
        ([{"CPU": 1, "GPU": 1}, {"CPU": 8, "GPU": 1}], "judge"),
        ([{"CPU": 1, "GPU": 3}, {"CPU": 1}], "defender"),
        ([], "judge"),
    ],
)
def test_who_has_no_room(nodes, missing):
    bundles = [Bundle("attacker", 0, 1, 0), Bundle("defender", 0, 1, 1), Bundle("judge", 0, 1, 2)]
    found = first_unplaced(bundles, nodes)
    assert (found and found.engine) == missing


def test_engines_of_a_run():
    tree = {
        "world": {},
        "judge": {"kind": "rule"},
        "rollout": {"engine": "vllm", "vllm": {"replicas": {"defender": 2, "judge": 3}}},
    }
    assert replicas_of(build_config(tree, "c")) == {"attacker": 1, "defender": 2}
    assert replicas_of(build_config(tree | {"judge": {"kind": "llm"}}, "c"))["judge"] == 3
    assert replicas_of(build_config(tree | {"game": {"skip_attacker": True}}, "c")) == {"defender": 2}


@pytest.mark.parametrize(
    ("rollout", "says"),
    [
        ({}, "cluster.placement: ray places vLLM engines, and this run has none; set rollout.engine: vllm"),
        ({"engine": "vllm", "vllm": {"transport": "ipc"}}, "rollout.vllm.transport: ipc does not leave its node"),
        ({"engine": "vllm", "vllm": {"devices": {"judge": "0"}}}, "rollout.vllm.devices: with cluster.placement: ray"),
    ],
)
def test_settings_that_do_not_go_with_ray(rollout, says):
    with pytest.raises(InputError, match=says):
        build_config({"world": {}, "rollout": rollout, "cluster": {"placement": "ray"}}, "c")


RANKS = {"world": {}, "learn": {"backend": "deepspeed"}, "cluster": {"placement": "ray", "trainer_ranks": 2}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cluster": {"trainer_ranks": 2}}, "ranks that Ray starts need cluster.placement: ray; set that, or leave"),
        ({"learn": {}}, "cluster.trainer_ranks: learn.backend: plain trains in the one process that was started; set"),
        (
            {"cluster": RANKS["cluster"] | {"gpus": {"trainer": 0.5}}},
            "cluster.gpus: a trainer rank computes on one GPU, or on none, not on 0.5; set trainer: 1 or 0",
        ),
    ],
)
def test_settings_that_do_not_go_with_trainer_ranks(changes, says):
    with pytest.raises(InputError, match=says):
        build_config(RANKS | changes, "c")


def test_trainer_ranks_are_checked_before_anything_loads(monkeypatch, capsys):
    """No engine has to be on the cluster; under torchrun, and with too few ranks, one line says what to do."""
    monkeypatch.setattr("advgame.learn.zero_config.find_spec", lambda name: True)
    config = build_config(RANKS, "c")
    check_backend(config)
    config.learn.deepspeed.attacker_ranks = 2
    with pytest.raises(
        InputError, match=r"attacker_ranks: 2 of 2 ranks leave none for .*; raise cluster.trainer_ranks"
    ):
        check_backend(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["train", Path(__file__).parents[2] / "configs" / "tiny.yaml", "--learn.backend", "deepspeed"]
    err = fails(capsys, *words, "--cluster", "ray", "--cluster.trainer_ranks", 2)
    assert err.startswith("advgame: cluster.trainer_ranks: Ray starts the trainer's ranks, but torchrun started 2 too;")


def test_devices_and_replicas_agree():
    def of(devices):
        return build_config(
            {"world": {}, "rollout": {"vllm": {"replicas": {"defender": 2}, "devices": devices}}}, "c"
        ).rollout.vllm

    assert [of({"defender": [1, 2]}).device_of("defender", i) for i in range(2)] == ["1", "2"]
    assert [of({"defender": "0"}).device_of("defender", i) for i in range(2)] == ["0", "0"]
    assert of({"defender": "0"}).device_of("attacker") is None
    with pytest.raises(InputError, match=r"rollout\.vllm\.devices: defender has 1 entries for 2 replicas"):
        of({"defender": ["0"]})


@pytest.mark.slow
def test_a_local_run_imports_no_ray():
    code = (
        "import sys; import advgame.run.commands, advgame.run.engines, advgame.rollout.replicas; "
        "assert 'ray' not in sys.modules and 'advgame.cluster.ray_process' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
