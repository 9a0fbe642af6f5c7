"""`advgame plan CONFIG --simulate --like RUN`: a step of the config on the machine where the run was measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from advgame.config import load_config
from advgame.errors import InputError
from advgame.plan.like import STAGES, Costs, Measured, Prediction, check, fit, placed, predict, read_run, seconds_of
from advgame.run.engines import replicas_of

FAR = 0.15
"""Root mean square of the logarithms beyond which the fitted simulation says little."""


def run_like(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Prints the fitted costs and the prediction. Raises InputError for bad input, before any step is simulated."""
    if arguments.cores is not None and arguments.cores < 1:
        raise InputError("--cores: give 1 or more")
    config = load_config(arguments.config, overrides)
    check(config, str(arguments.config))
    runs = [read_run(path, arguments.cores) for path in arguments.like]
    for run in runs:
        if run.placed != placed(config):
            raise InputError(
                f"--like {run.path}: cluster: it was played on {run.placed}, and {arguments.config} is to be on "
                f"{placed(config)}; give a run that was placed alike, or set cluster.placement"
            )
    lacking = sorted(set(replicas_of(config)) - {name for run in runs for name in run.replicas})
    if lacking:
        raise InputError(f"--like {arguments.like[0]}: no {lacking[0]} was measured there; give a run of the same game")
    costs, error = fit(runs)
    made = predict(config, runs, costs, arguments.seed)
    console = Console()
    console.print(costs_line(runs, costs, error), highlight=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("", "replicas", "trees", "s/step", *STAGES):
        table.add_column(name, justify="left" if name in ("", "replicas") else "right", no_wrap=True)
    for run in runs:
        table.add_row("measured", words_of(run.replicas), *cells(measured_seconds(run), len(run.steps[0].trees)))
    trees = config.data.harmful + config.data.benign
    table.add_row("simulated", words_of(replicas_of(config)), *cells(made.seconds, trees))
    console.print(table)
    busy = ", ".join(f"{role} {share:.0%}" for role, share in made.busy.items())
    console.print(f"busy in play: {busy}, driver {made.driver:.0%}; {3600 / made.total:.0f} steps an hour")
    if arguments.json is not None:
        tree = {
            "costs": asdict(costs),
            "error": error,
            "prediction": plain(made),
            "runs": list(map(str, arguments.like)),
        }
        arguments.json.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    return 0


def measured_seconds(run: Measured) -> dict[str, float]:
    """Medians over the measured steps, by stage."""
    return {stage: seconds_of(run, stage) for stage in STAGES}


def costs_line(runs: Sequence[Measured], costs: Costs, error: float) -> str:
    sure = "" if error <= FAR else "; the simulation does not describe these runs well, take it as a rough guess"
    return (
        f"{runs[0].cores} cores; a decode step {1e3 * costs.step:.2f} ms and {1e3 * costs.row:.3f} ms a completion "
        f"in it, a prefill {1e3 * costs.prefill:.2f} ms, the driver {1e3 * costs.driver:.2f} ms a request; fitted to "
        f"within {error:.0%} of {sum(len(run.steps) for run in runs)} measured steps{sure}"
    )


def words_of(replicas: dict[str, int]) -> str:
    return " ".join(f"{name} {count}" for name, count in replicas.items())


def cells(seconds: dict[str, float], trees: int) -> list[str]:
    return [str(trees), f"{sum(seconds.values()):.3f}", *(f"{seconds[stage]:.3f}" for stage in STAGES)]


def plain(made: Prediction) -> dict[str, Any]:
    return {"seconds": made.seconds, "total": made.total, "driver": made.driver, "busy": made.busy}
