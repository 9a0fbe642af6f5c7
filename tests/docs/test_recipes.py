"""The launch recipes of docs/cluster.md, as dry as it gets: Slurm's script with stand-ins for what it starts, the lines
for one node by Ray's own parser, the manifest for Kubernetes by its keys."""

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from advgame import cli
from advgame.config import load_config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
NOTE = "import json, os, sys; print(json.dumps([{name!r}, os.environ.get('NODE'), sys.argv[1:], dict(os.environ)]))"
STAND_INS = {
    "sleep": ":",
    "openssl": "echo 0123456789abcdef",
    "scontrol": "printf 'node-a\\nnode-b\\n'",
    # one task a node: which of them is named, the rest is the command
    "srun": 'while :; do case "$1" in --overlap) shift;; -N) shift 2;; -w) export NODE="$2"; shift 2;; '
    '-x) export NODE="not $2"; shift 2;; -*) exit 2;; *) break;; esac; done; exec "$@"',
}


def part(title: str, language: str = "") -> str:
    """The first code block of that language below a heading."""
    found = re.search(rf"^### {title}$.*?^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert found is not None, title
    return found[1]


def parsed_by_ray(words: list[str]) -> dict:
    scripts = pytest.importorskip("ray.scripts.scripts")
    return scripts.start.make_context("ray start", words).params


def parsed_by_us(words: list[str]) -> None:
    arguments, overrides = cli.build_parser().parse_known_args(words)
    load_config(ROOT / arguments.config, overrides)
    assert arguments.command == "train"


def test_one_node():
    for line in part("One node").splitlines():
        given, *words = [word for word in shlex.split(line) if word != "env"]
        assert given.startswith("CUDA_VISIBLE_DEVICES=")
        if words[:2] == ["ray", "start"]:
            params = parsed_by_ray(words[2:])
            assert (params["head"], params["node_ip_address"]) == (True, "127.0.0.1")
        else:
            assert words[0] == "advgame"
            parsed_by_us(words[1:])


def test_slurm(tmp_path):
    """The head on the first node without its first GPU, the others joined to it, the run on the first with that GPU;
    all of them with one token."""
    script, bin_ = tmp_path / "job.sh", tmp_path / "bin"
    script.write_text(part("Slurm", "bash"))
    bin_.mkdir()
    python = shlex.quote(sys.executable)
    noted = {name: f'exec {python} -c {shlex.quote(NOTE.format(name=name))} "$@"' for name in ("ray", "advgame")}
    for name, line in (STAND_INS | noted).items():
        (bin_ / name).write_text(f"#!/bin/bash\n{line}\n")
        (bin_ / name).chmod(stat.S_IRWXU)
    slurm = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2", "PURPOSE": "a dry run"}
    before = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    # what the script leaves in the background is waited for
    done = subprocess.run(
        ["bash", "-euc", f"source {shlex.quote(str(script))}; wait"], capture_output=True, text=True, timeout=60,
        env=before | slurm | {"PATH": f"{bin_}:/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    calls = {(name, node): (words, own) for name, node, words, own in map(json.loads, done.stdout.splitlines())}
    assert set(calls) == {("ray", "node-a"), ("ray", "not node-a"), ("advgame", "node-a")}
    head, others, run = (calls[key] for key in (("ray", "node-a"), ("ray", "not node-a"), ("advgame", "node-a")))
    for words, environment in calls.values():
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN"] == "0123456789abcdef"
        assert not any("0123456789abcdef" in word for word in words)
    assert head[0][0] == others[0][0] == "start"
    params = parsed_by_ray(head[0][1:])
    assert (params["head"], params["port"], params["block"]) == (True, 6379, True)
    params = parsed_by_ray(others[0][1:])
    assert (params["head"], params["address"], params["block"]) == (False, "node-a:6379", True)
    parsed_by_us(run[0])
    assert run[1]["RAY_ADDRESS"] == "node-a:6379"
    gpus = [set(one["CUDA_VISIBLE_DEVICES"].split(",")) for one in (head[1], run[1])]
    assert gpus == [set("1234567"), {"0"}]
    asked = dict(re.findall(r"--([\w-]+)=(\d+)", re.search(r"^#SBATCH (.*)$", script.read_text(), re.MULTILINE)[1]))
    assert asked == {"nodes": "2", "gpus-per-node": "8", "ntasks-per-node": "1"}


def test_kubernetes():
    """The keys that KubeRay wants, Ray's version as it is tried, every mount with its volume, no token in the file."""
    made = yaml.safe_load(part("Kubernetes", "yaml"))
    assert (made["apiVersion"], made["kind"]) == ("ray.io/v1", "RayCluster")
    spec = made["spec"]
    assert set(spec) == {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-gpus": "0"}
    assert f"Ray {spec['rayVersion'].rpartition('.')[0]}" in PAGE.partition("## What has been tried")[2]
    (workers,) = spec["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    assert workers["groupName"]
    for group in (spec["headGroupSpec"], workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"]
        assert container["image"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] >= 1
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        assert volumes["shm"]["emptyDir"] == {"medium": "Memory"}
        params = [f"--{key}={value}" for key, value in group["rayStartParams"].items()]
        parsed_by_ray([*params, *(["--head"] if group is spec["headGroupSpec"] else ["--address", "head:6379"])])
