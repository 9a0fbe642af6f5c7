"""What engines ask of a cluster, who finds no room, and settings that do not go with Ray; no Ray is needed here."""

import subprocess
import sys

import pytest

from advgame.cluster.bundles import Bundle, bundles_of, first_unplaced
from advgame.cluster.settings import ClusterSettings
from advgame.config import build_config
from advgame.errors import InputError
from advgame.run.engines import replicas_of


def test_bundles_of_every_replica():
    settings = ClusterSettings(cpus={"judge": 4}, gpus={"attacker": 0.5})
    made = bundles_of(settings, {"attacker": 1, "defender": 2, "judge": 1}, 2, gpus=True)
    assert [(b.engine, b.replica, b.cpus, b.gpus) for b in made] == [
        ("attacker", 0, 1, 0.5), ("defender", 0, 1, 2), ("defender", 1, 1, 2), ("judge", 0, 4, 2)
    ]  # fmt: skip
    assert str(made[2]) == "defender replica 2 (1 CPU and 2 GPU)"
    assert bundles_of(settings, {"judge": 1}, 2, gpus=False)[0].resources == {"CPU": 4}


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


def test_a_local_run_imports_no_ray():
    code = (
        "import sys; import advgame.run.commands, advgame.run.engines, advgame.rollout.replicas; "
        "assert 'ray' not in sys.modules and 'advgame.cluster.ray_process' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
