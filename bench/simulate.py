"""The simulation against real runs of another layout: `python -m bench simulate [--ray] [--steps 40] [--out]`.

The tiny world is played on vLLM's engines, all processes on this machine; with `--ray` every engine is an actor on a
node of its own of a Ray cluster. Two runs with one engine for each player, of a small and a large batch, fix the costs
(`advgame/plan/like.py`); from them alone it is predicted what a step takes with two Defender replicas and a batch
between the two, and then that is measured. Nothing of the measured layout enters its prediction. Runs that are in
FOLDER already are not made again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from advgame.config import load_config
from advgame.plan.like import STAGES, fit, predict, read_run
from advgame.plan.like_command import costs_line, measured_seconds
from advgame.rollout import vllm_start
from bench import ray_nodes
from bench.records import device_name, save

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
MARK = 0.15
SETTINGS = {
    "run.purpose": "a benchmark", "run.tensorboard": "false", "run.validate_every": 0, "run.exact_every": 0,
    "run.checkpoint_every": 0, "data.validation_limit": 8, "rollout.engine": "vllm",
    "rollout.vllm.max_model_len": 256, "rollout.vllm.cache_gib": 0.25,
}  # fmt: skip
RAY = {"cluster.placement": "ray", "cluster.silence_s": 20}
NODES = (1, 1, 1)
"""CPUs of each node; an engine takes one."""
LAYOUTS: dict[str, tuple[int, int]] = {"small": (8, 1), "large": (24, 1), "other": (16, 2)}
"""Seeds of each category, and Defender replicas; the last is predicted."""


def child(words: list[str]) -> int:
    """One run of `advgame train` without the exact evaluation, which is no part of a step."""
    from advgame import cli
    from advgame.run import loop

    loop.exact = lambda session: {}
    return cli.main(words)


def words_of(name: str, root: Path, steps: int, more: Mapping[str, Any]) -> list[str]:
    """The settings of a layout, as overrides."""
    seeds, defenders = LAYOUTS[name]
    settings = {
        **SETTINGS, **more, "run.root": root, "run.name": name, "run.steps": steps, "data.harmful": seeds,
        "data.benign": seeds, "rollout.vllm.replicas": f"{{defender: {defenders}}}",
    }  # fmt: skip
    return [word for field, value in settings.items() for word in (f"--{field}", str(value))]


def measure(root: Path, steps: int, more: Mapping[str, Any]) -> None:
    """Makes the runs that are not there."""
    lacking = [name for name in LAYOUTS if not (root / name / "summary.json").is_file()]
    with ray_nodes.nodes(NODES) if lacking and more else nullcontext() as cluster:
        address = {} if cluster is None else {"cluster.address": cluster.address}
        for name in lacking:
            words = ["train", str(TINY), "--quiet", *words_of(name, root, steps, {**more, **address})]
            subprocess.run([sys.executable, "-m", "bench", "simulate", "--child", *words], check=True)
            print(f"  {name}: done", file=sys.stderr, flush=True)


def compare(root: Path, steps: int, more: Mapping[str, Any]) -> dict[str, Any]:
    """Prediction and measurement of the last layout."""
    *known, other = LAYOUTS
    runs = [read_run(root / name) for name in known]
    costs, error = fit(runs)
    made = predict(load_config(TINY, words_of(other, root, steps, more)), runs, costs)
    print(f"  {costs_line(runs, costs, error)}")
    real = measured_seconds(read_run(root / other))
    return {
        "costs": asdict(costs), "error": error, "layouts": LAYOUTS, "predicted": made.seconds, "measured": real,
        "fitted_to": {name: measured_seconds(run) for name, run in zip(known, runs, strict=True)},
        "ratio": made.total / sum(real.values()), "play_ratio": made.seconds["play"] / real["play"],
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    """Command line; prints a table, writes JSON with `--out`. Exit code 1: the prediction is off by more than 15 %."""
    if arguments[:1] == ["--child"]:
        return child(arguments[1:])
    parser = argparse.ArgumentParser(prog="python -m bench simulate", description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--ray", action="store_true", help="engines are actors of a Ray cluster of several nodes")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="the runs' folder; what is there is taken as it is")
    parser.add_argument("--out", action="store_true", help="write bench/results/simulate[-ray]-cpu-<date>.json")
    options = parser.parse_args(arguments)
    more = RAY if options.ray else {}
    version = vllm_start.vllm_version("bench simulate")
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) if options.keep is None else options.keep.resolve()
        root.mkdir(parents=True, exist_ok=True)
        measure(root, options.steps, more)
        device = device_name(torch.device("cpu"))
        print(f"{device}, vLLM {version}, torch {torch.__version__}; tiny world, {options.steps} steps a run")
        result = compare(root, options.steps, more)
    print(f"  {'seconds':32}{'step':>8}" + "".join(f"{stage:>9}" for stage in STAGES))
    rows = {
        f"measured, {LAYOUTS[name][0] * 2} trees, 1 Defender": result["fitted_to"][name] for name in ("small", "large")
    }
    seeds, defenders = LAYOUTS["other"]
    for what in ("predicted", "measured"):
        rows[f"{what}, {seeds * 2} trees, {defenders} Defenders"] = result[what]
    for name, row in rows.items():
        print(f"  {name:32}{sum(row.values()):8.3f}" + "".join(f"{row[stage]:9.3f}" for stage in STAGES))
    print(f"  predicted over measured: {result['ratio']:.3f} of a step, {result['play_ratio']:.3f} of its play")
    if options.out:
        head = {"device": device, "vllm": version, "torch": torch.__version__, "steps": options.steps, "mark": MARK}
        if options.ray:
            head |= {"ray": importlib.metadata.version("ray"), "nodes": NODES}
        whole = head | {"settings": {**SETTINGS, **more}, "result": result}
        save(json.loads(json.dumps(whole)), f"simulate{'-ray' if options.ray else ''}-cpu")
    return 0 if abs(result["ratio"] - 1) <= MARK else 1
