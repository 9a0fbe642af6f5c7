"""`advgame plan`: what a config would need and do on so many GPUs, and why."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, fields
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from advgame.config import Config, load_config
from advgame.errors import InputError
from advgame.plan.assumptions import HARDWARE, Assumption, Assumptions, Hardware, calibrate, override
from advgame.plan.layouts import Cast, Estimate, Layout, best, estimate
from advgame.plan.like_command import run_like
from advgame.plan.shapes import shape_of
from advgame.plan.workload import Workload

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
SCALES = (16, 64, 256, 1024, 4096)


def run_plan(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Prints assumptions, the best splits, and (with --simulate) the scaling. Raises InputError for bad input."""
    if arguments.like:
        return run_like(arguments, overrides)
    if arguments.gpus < 1:
        raise InputError("--gpus: give 1 or more")
    config = load_config(arguments.config, overrides)
    hardware, used = calibrate(HARDWARE[arguments.gpu], RESULTS)
    words = {}
    for word in arguments.assume:
        name, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"--assume {word}: write --assume name=value")
        words[name.strip()] = value.strip()
    hardware, assumed = override(hardware, Assumptions(), words)
    cast = cast_of(config)
    work = Workload.of(config, assumed)
    trees = work.draw(arguments.seed)
    reference_pass = config.learn.reference != "rollout"
    how = {
        "ahead": bool(arguments.ahead), "reference_pass": reference_pass,
        "micro_tokens": config.learn.micro_tokens, "hardware": hardware, "assumed": assumed,
    }  # fmt: skip
    console = Console()
    console.print(f"{arguments.gpus} x {hardware.name}; {_cast_line(cast)}")
    console.print(
        f"a step: {work.trees} seeds, A = {work.attacks}, D = {work.responses}, "
        f"{work.requests_per_tree:g} requests a tree at most, {sum(1 for t in trees for _ in t.requests())} drawn"
    )
    shown = []
    if arguments.layout:
        asked = parse_layout(arguments.layout)
        one = estimate(asked, cast, work, trees, **how)  # type: ignore[arg-type]
        if one is None:
            raise InputError(f"--layout {arguments.layout}: a model does not fit into the memory of its GPUs")
        shown.append(("asked", one))
    found = best(arguments.gpus, cast, work, trees, **how)  # type: ignore[arg-type]
    if not found and not shown:
        raise InputError(
            f"--gpus {arguments.gpus}: these models do not fit on {arguments.gpus} x {hardware.name}; "
            "give more GPUs or smaller models"
        )
    shown += [("best" if i == 0 else "", one) for i, one in enumerate(found)]
    console.print(_layout_table(shown))
    top = shown[0][1] if arguments.layout else found[0]
    console.print(_memory_table(shown))
    steps = config.run.steps
    kwh = top.energy(steps)
    console.print(
        f"{steps} steps with {top.layout}: {steps * top.seconds / 3600:.1f} h, {kwh:.0f} kWh, "
        f"{kwh * assumed.carbon.value:.0f} kg CO2e (GPU power model; see the assumptions)"
    )
    scaling = []
    if arguments.simulate:
        scaling = scale(top.layout, cast, config, how)
        console.print(_scaling_table(scaling))
    console.print(_assumption_table(hardware, assumed, used))
    if arguments.json is not None:
        tree = {
            "gpus": arguments.gpus, "layouts": [_plain(one) for _, one in shown], "scaling": scaling,
            "assumptions": {n: asdict(a) for n, a in _named(hardware, assumed)}, "calibrated": used,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    return 0


def cast_of(config: Config) -> Cast:
    """Shapes of the players and the judge. Raises InputError for the tiny world, which needs no plan."""
    if config.world is not None:
        raise InputError("world: the tiny world runs on one CPU core; plan a config with real models")
    assert config.defender.model is not None, "checked by the config"
    attacker = None
    if not config.game.skip_attacker:
        attacker = shape_of(config.attacker.model or config.defender.model, "attacker.model")
    judge = None
    if config.judge.kind == "llm" and config.judge.endpoint is None and config.judge.model is not None:
        judge = shape_of(config.judge.model, "judge.model")
    return Cast(attacker, shape_of(config.defender.model, "defender.model"), judge)


def parse_layout(text: str) -> Layout:
    """ "8+1+1+6" or "8+1+1+3x2". Raises InputError otherwise."""
    try:
        trainer, attacker, defender, judge = text.replace(" ", "").split("+")
        judges, _, size = judge.partition("x")
        layout = Layout(int(trainer), int(attacker), int(defender), int(judges), int(size or 1))
    except ValueError:
        raise InputError(f"--layout {text!r}: write trainer+attacker+defender+judge, for example 8+1+1+6") from None
    if layout.trainer < 1 or layout.defender < 1 or min(layout.attacker, layout.judges, layout.judge_tp) < 0:
        raise InputError(f"--layout {text!r}: the trainer and the Defender need a GPU each")
    return layout


def scale(layout: Layout, cast: Cast, config: Config, how: dict) -> list[dict[str, float | str]]:
    """The layout and its batch multiplied until thousands of GPUs; each row says what is busiest."""
    rows: list[dict[str, float | str]] = []
    trees = config.data.harmful + config.data.benign
    for gpus in SCALES:
        times = max(1, gpus // layout.gpus)
        if rows and times * layout.gpus == rows[-1]["gpus"]:
            continue
        bigger = Layout(
            layout.trainer * times, layout.attacker * times, layout.defender * times, layout.judges * times,
            layout.judge_tp,
        )  # fmt: skip
        work = Workload.of(config, how["assumed"], trees * times)
        one = estimate(bigger, cast, work, work.draw(0), **how)
        if one is None:
            break
        busiest = max([("driver", one.play.driver), *one.play.busy.items()], key=lambda pair: pair[1])
        if one.train.seconds > one.play.seconds:
            limit = "training"
        else:  # nobody busy: trees wait for the longest completions of their own stages
            limit = f"play: {busiest[0]}" if busiest[1] > 0.9 else "play: longest trees"
        rows.append(
            {
                "gpus": bigger.gpus, "trees": work.trees, "seconds": one.seconds, "play": one.play.seconds,
                "train": one.train.seconds, "driver_busy": one.play.driver,
                "trees_per_gpu_hour": work.trees * 3600 / one.seconds / bigger.gpus, "limit": limit,
            }
        )  # fmt: skip
    return rows


def _cast_line(cast: Cast) -> str:
    parts = [("Attacker", cast.attacker), ("Defender", cast.defender), ("judge", cast.judge)]
    return ", ".join(f"{role} {s.name} ({s.parameters / 1e9:.2f} B)" if s else f"no {role} model" for role, s in parts)


def _layout_table(shown: list[tuple[str, Estimate]]) -> Table:
    table = Table(
        title="trainer+Attacker+Defender+judge; seconds",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("", "split", "s/step", "steps/h", "play", "train", "pub.", "ZeRO", "busy A D J", "kW"):
        table.add_column(name, justify="left" if name in ("", "split") else "right", no_wrap=True)
    for mark, one in shown:
        busy = " ".join(f"{one.play.busy.get(role, 0.0):.0%}" for role in ("attacker", "defender", "judge"))
        table.add_row(
            mark, str(one.layout), f"{one.seconds:.1f}", f"{one.steps_per_hour:.0f}", f"{one.play.seconds:.1f}",
            f"{one.train.seconds:.1f}", f"{one.publish:.2f}", str(one.fit.stage), busy, f"{one.watts / 1e3:.1f}",
        )  # fmt: skip
    return table


def _memory_table(shown: list[tuple[str, Estimate]]) -> Table:
    table = Table(
        title="GiB on a GPU; the trainer's are states + activations + head, an engine's weights and the cache that 256 "
        "completions can use",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    roles = [role for role in ("trainer", "attacker", "defender", "judge") if any(role in e.memory for _, e in shown)]
    for name in ("split", *roles, "states", "activations", "head"):
        table.add_column(name, justify="left" if name == "split" else "right", no_wrap=True)
    gib = float(1 << 30)
    for _, one in shown:
        parts = (one.fit.states / gib, one.fit.activations / gib, one.fit.head / gib)
        cells = [f"{one.memory[role]:.0f}" if role in one.memory else "" for role in roles]
        table.add_row(str(one.layout), *cells, *(f"{part:.0f}" for part in parts))
    return table


def _scaling_table(rows: list[dict[str, float | str]]) -> Table:
    table = Table(
        title="the same split and batch, multiplied", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for name in ("GPUs", "trees", "s/step", "play", "train", "driver", "trees/GPU/h", "limited by"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row['gpus']}", f"{row['trees']}", f"{row['seconds']:.1f}", f"{row['play']:.1f}", f"{row['train']:.1f}",
            f"{row['driver_busy']:.0%}", f"{row['trees_per_gpu_hour']:.0f}", str(row["limit"]),
        )  # fmt: skip
    return table


def _named(hardware: Hardware, assumed: Assumptions) -> list[tuple[str, Assumption]]:
    own = [(f.name, getattr(hardware, f.name)) for f in fields(hardware) if f.name != "name"]
    return own + list(assumed.items())


def _assumption_table(hardware: Hardware, assumed: Assumptions, used: list[str]) -> Table:
    calibrated = f"; calibrated: {', '.join(used)}" if used else "; no measured result of this GPU in bench/results"
    table = Table(
        title=f"assumptions (replace one: --assume name=value){calibrated}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("name", "value", "unit", "source"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for name, one in _named(hardware, assumed):
        table.add_row(name, f"{one.value:g}", one.unit, one.source)
    return table


def _plain(one: Estimate) -> dict:
    return {
        "layout": str(one.layout), "seconds": one.seconds, "steps_per_hour": one.steps_per_hour,
        "play": asdict(one.play), "train": asdict(one.train), "publish": one.publish, "zero_stage": one.fit.stage,
        "memory_gib": one.memory, "watts": one.watts,
    }  # fmt: skip
