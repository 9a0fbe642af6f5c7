"""A run that is killed again and again: `python -m bench soak [--steps 1000] [--kill-every 50] [--twin] [--out]`.

The real `advgame train` plays the tiny world; at random moments its process is killed with SIGKILL: while it starts,
in the middle of a step, while a checkpoint is written, just after one; or one of its children alone is. `advgame
resume` goes on each time. In the end every step and every tree must be there exactly once and in order, the checkpoints
whole (they are looked at after every kill as well), and no process, listening port, shared memory or temporary file may
be left. `--twin` plays the same run without kills: rows, trees and weights must be the same to the last bit.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from advgame.config import load_config
from bench.records import device_name, save
from bench.soak_checks import differences, learned_from, played_again, problems
from bench.soak_run import Soak

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
SETTINGS = {
    "run.purpose": "a soak test", "run.validate_every": 0, "run.exact_every": 0, "run.checkpoint_every": 10,
    "run.keep_checkpoints": 2, "data.harmful": 2, "data.benign": 2, "data.validation_limit": 8,
}  # fmt: skip
ENGINES = {"rollout.engine": "vllm", "rollout.vllm.cache_gib": 0.25, "rollout.vllm.restarts": 1000}


def soak(root: Path, settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The killed run, the twin if asked for, and what was found; `root` is an empty folder."""
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    config = load_config(options.config, words)
    words, steps = [str(options.config.resolve()), *words], config.run.steps
    began = time.time()
    children = options.engine == "vllm" or config.run.ahead == 1
    one = Soak(root, words, every=options.kill_every, children=children, seed=options.seed, nice=options.nice)
    one.play(lambda text: print(f"  {time.time() - began:6.0f} s  {text}", file=sys.stderr, flush=True))
    seconds, trees = time.time() - began, config.data.harmful + config.data.benign
    wrong = problems(
        one.run, steps=steps, trees=trees, keep=config.run.keep_checkpoints, tensorboard=config.run.tensorboard
    )
    if not (pairs := learned_from(one.run)):
        wrong.append("no pair was learned from: equal weights would say nothing")
    result: dict[str, Any] = {
        "seconds": seconds, "kills": dict(one.found.kills), "starts": one.found.starts, "anew": one.found.anew,
        "played_again": played_again(one.run), "orphan_s": one.found.orphan_s, "trees": trees * steps, "pairs": pairs,
        "listened": sorted({address for address, _ in one.found.ports}), "problems": wrong, "leaks": one.leaks(),
    }  # fmt: skip
    if options.twin:
        began = time.time()
        (root / "whole").mkdir()
        (root / "cache").rename(root / "whole" / "cache")
        whole = Soak(root / "whole", words, every=None, children=False, seed=0, nice=options.nice)
        whole.play()
        result |= {"twin_seconds": time.time() - began, "twin_differs": differences(one.run, whole.run)}
    return result


def report(result: dict[str, Any]) -> list[str]:
    """Prints the table; returns what is wrong."""
    kills = result["kills"]
    print(
        f"  {result['starts']} starts in {result['seconds']:.0f} s; killed {sum(kills.values())} times: "
        + ", ".join(f"{how} {count}" for how, count in kills.items())
    )
    print(
        f"  {result['played_again']} steps played again, {result['trees']} trees recorded, learned from "
        f"{result['pairs']:.0f} pairs"
    )
    print(f"  the last child outlived a killed run by {result['orphan_s']:.2f} s; listened on {result['listened']}")
    twin = "twin_differs" in result
    parts = {"the run's folder": "problems", "left behind": "leaks"} | (
        {"against the twin": "twin_differs"} if twin else {}
    )
    for name, key in parts.items():
        print(f"  {name:20}{'nothing wrong' if not result[key] else f'{len(result[key])} WRONG'}")
        for text in result[key][:20]:
            print(f"    {text}")
    return [text for key in parts.values() for text in result[key]]


def main(arguments: list[str]) -> int:
    """Command line; prints a table, writes JSON with `--out`. Exit code 1: something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench soak", description=__doc__)
    parser.add_argument("--config", type=Path, default=TINY)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--kill-every", type=int, default=50, help="steps between kills, in the mean")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("FIELD", "VALUE"), help="a setting")
    parser.add_argument("--twin", action="store_true", help="compare with a run that nobody kills (transformers)")
    parser.add_argument("--nice", type=int, default=0, help="added to the run's own, so that others go first")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the run and its logs there")
    parser.add_argument("--out", action="store_true", help="write bench/results/soak-<engine>-cpu-<date>.json")
    options = parser.parse_args(arguments)
    settings: dict[str, Any] = SETTINGS | {"run.steps": options.steps}
    if options.engine == "vllm":
        settings |= ENGINES
    settings |= {name: yaml.safe_load(value) for name, value in options.set}
    if options.keep is not None:
        options.keep.mkdir(parents=True)
        result = soak(options.keep.resolve(), settings, options)
    else:
        with tempfile.TemporaryDirectory(prefix="soak-") as root:
            result = soak(Path(root), settings, options)
    device = device_name(torch.device("cpu"))
    print(f"{device}, torch {torch.__version__}, {options.engine}; {options.steps} steps, seed {options.seed}")
    wrong = report(result)
    if options.out:
        head = {
            "device": device,
            "torch": torch.__version__,
            "config": options.config.stem,
            "steps": options.steps,
            "kill_every": options.kill_every,
            "seed": options.seed,
            "engine": options.engine,
        }
        save(head | {"settings": settings, "result": result}, f"soak-{options.engine}-cpu")
    return 1 if wrong else 0
