"""Whole steps of the tiny world, three ways: `python -m bench loop [--steps 300] [--seeds 3] [--config FILE] [--out]`.

`barriers` plays stage by stage and then learns, as published; `in step` plays without barriers and then learns;
`ahead` (`run.ahead: 1`) plays the next step's trees while this one learns. Each is a run of its own from the same
settings, in alternation; evaluation counts in no time. Hidden is what play, learning and publishing took beyond the
wall time they took together, over the shorter of play and learning: in the run itself, and against the run in step,
whose play and learning nothing slows down. With several seeds the final figures stand side by side, with their noise.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from advgame.game.play import Table
from advgame.game.tree import Seed, Tree
from advgame.run import names
from bench.records import device_name, save
from bench.stages import play_stages

BARRED, STEPWISE, AHEAD = "barriers", "in step", "ahead"
WAYS = {BARRED: 0, STEPWISE: 0, AHEAD: 1}
"""Contenders, and their `run.ahead`."""
OFF = ("validate_every", "exact_every", "checkpoint_every")
STAGES = ("play", "learn", "publish")


async def play_barred(
    table: Table,
    seeds: Sequence[Seed],
    step: int,
    *,
    in_flight: int,
    on_tree: Callable[[Tree], None] | None = None,
    only: Collection[int] | None = None,
) -> list[Tree]:
    """`play_batch` with barriers: all trees, each known when all have ended."""
    rules = table.rules
    judged = rules.faithfulness and rules.pairwise and rules.attacker_judge
    assert judged, "bench loop plays the standard rules"
    assert not rules.judge_sees_seed, "bench loop plays the standard rules"
    assert not rules.defender_reasoning, "bench loop plays the standard rules"
    assert only is None or len(only) == len(seeds), "barriers know no trees of their own"
    trees = await play_stages(table, seeds, step)
    for tree in trees:
        if on_tree is not None:
            on_tree(tree)
    return trees


def child(way: str, words: list[str]) -> int:
    """One run of `advgame train`, in a process of its own."""
    from advgame import cli
    from advgame.run import plays

    if way == BARRED:
        plays.play_batch = play_barred
    return cli.main(words)


def read(run: Path) -> dict[str, Any]:
    """Seconds of a run's steps, evaluation left out, by what they went into, and its final figures."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if names.STEP_SECONDS in row]

    def total(name: str) -> float:
        return sum(row.get(name, 0.0) for row in rows)

    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return {
        "steps": len(rows),
        "wall": total(names.STEP_SECONDS) - total(names.stage_seconds("validate")),
        "hidden": total(names.HIDDEN_SECONDS),
        **{stage: total(names.stage_seconds(stage)) for stage in STAGES},
        "engine_seconds": summary["engine_seconds"],
        "judge_share": summary["judge_share"],
        "trees_per_hour": summary["trees_per_hour"],
        "after": {name: summary[f"{name}_after"] for name in names.LABELS if f"{name}_after" in summary},
    }


def compare(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Medians and shares of all contenders, and the final figures of `ahead` against those of `in step`."""

    def middle(way: str, what: str) -> float:
        return statistics.median(run[what] for run in runs[way])

    result: dict[str, Any] = {
        way: {what: middle(way, what) for what in ("wall", "hidden", "trees_per_hour", *STAGES)} for way in runs
    }
    if BARRED in runs:
        for way in set(runs) - {BARRED}:
            result[way]["against_barriers"] = result[BARRED]["wall"] / result[way]["wall"]
    if {STEPWISE, AHEAD} <= set(runs):
        own, alone = result[AHEAD], result[STEPWISE]
        result["hidden_share"] = own["hidden"] / min(own["play"], own["learn"])
        result["hidden_share_of_in_step"] = (alone["wall"] - own["wall"]) / min(alone["play"], alone["learn"])
        result["figures"] = {
            name: noise([run["after"][name] for run in runs[STEPWISE]], [run["after"][name] for run in runs[AHEAD]])
            for name in runs[STEPWISE][0]["after"]
        }
    return result


def noise(one: Sequence[float], other: Sequence[float]) -> dict[str, float | bool | None]:
    """Means of two contenders over seeds, and whether they differ by at most two standard errors of the difference."""
    found: dict[str, float | bool | None] = {STEPWISE: statistics.mean(one), AHEAD: statistics.mean(other)}
    if min(len(one), len(other)) < 2:
        return found | {"standard_error": None, "within_noise": None}
    error = math.sqrt(statistics.variance(one) / len(one) + statistics.variance(other) / len(other))
    within = abs(statistics.mean(one) - statistics.mean(other)) <= 2 * error
    return found | {"standard_error": error, "within_noise": within}


def report(runs: Mapping[str, Sequence[Mapping[str, Any]]], result: Mapping[str, Any]) -> str:
    """Tables of seconds and of final figures."""
    lines = [f"  {'seconds, median run':20}{'wall':>8}{'play':>8}{'learn':>8}{'publish':>9}{'hidden':>8}{'trees/h':>9}"]
    for way, taken in runs.items():
        row = result[way]
        engines = ", ".join(f"{role} {seconds:.1f}" for role, seconds in taken[0]["engine_seconds"].items())
        share = "" if taken[0]["judge_share"] is None else f"; judge's share {taken[0]['judge_share']:.0%}"
        faster = f"; {row['against_barriers']:.2f} x the barriers" if "against_barriers" in row else ""
        lines.append(
            f"  {way:20}{row['wall']:8.1f}{row['play']:8.1f}{row['learn']:8.1f}{row['publish']:9.2f}"
            f"{row['hidden']:8.1f}{row['trees_per_hour']:9.0f}   engine-seconds {engines}{share}{faster}"
        )
    if "hidden_share" in result:
        lines.append(
            f"  ahead hides {result['hidden_share']:.0%} of the shorter of play and learning in its own run, "
            f"{result['hidden_share_of_in_step']:.0%} of that of the run in step"
        )
    for name, row in result.get("figures", {}).items():
        verdict = {None: "one seed tells no noise", True: "within noise", False: "BEYOND noise"}[row["within_noise"]]
        error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.4f}"
        label = names.LABELS[name]
        lines.append(f"  {label:32} in step {row[STEPWISE]:.4f}, ahead {row[AHEAD]:.4f}{error}: {verdict}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Command line; prints tables, writes JSON with `--out`."""
    if arguments[:1] == ["--child"]:
        return child(arguments[1], arguments[2:])
    parser = argparse.ArgumentParser(prog="python -m bench loop", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/tiny.yaml"), help="of a tiny world")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2, help="runs of every contender")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("FIELD", "VALUE"), help="a setting")
    parser.add_argument("--out", action="store_true", help="write bench/results/loop-<config>-<device>-<date>.json")
    options = parser.parse_args(arguments)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in options.ways}
    with tempfile.TemporaryDirectory() as root:
        for seed in range(options.seeds):
            for way in options.ways if seed % 2 == 0 else options.ways[::-1]:
                name = f"{way.replace(' ', '-')}-{seed}"
                settings = {
                    "run.root": root, "run.name": name, "run.purpose": "a benchmark", "run.steps": options.steps,
                    "run.seed": seed, "run.ahead": WAYS[way], "run.tensorboard": "false",
                    **{f"run.{field}": 0 for field in OFF}, **dict(options.set),
                }  # fmt: skip
                words = ["train", str(options.config), "--quiet"]
                words += [word for field, value in settings.items() for word in (f"--{field}", str(value))]
                subprocess.run([sys.executable, "-m", "bench", "loop", "--child", way, *words], check=True)
                runs[way].append(read(Path(root, name)))
                made = runs[way][-1]
                print(f"{way}, seed {seed}: {made['wall']:.1f} s in {made['steps']} steps", file=sys.stderr, flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = compare(runs)
    print(
        f"{device_name(device)}, torch {torch.__version__}; {options.config.stem}, {options.steps} steps, "
        f"seeds 0 to {options.seeds - 1}"
    )
    print(report(runs, result))
    if options.out:
        head = {
            "device": device_name(device), "torch": torch.__version__, "config": options.config.stem,
            "steps": options.steps, "seeds": options.seeds, "settings": dict(options.set),
        }  # fmt: skip
        save(head | {"result": result, "runs": runs}, f"loop-{options.config.stem}-{device.type}")
    return 0
