"""`advgame lab`: plays the variants, then writes one table, the judged directions, and the figures."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import advgame
from advgame.errors import InputError
from advgame.lab.figures import draw_figures
from advgame.lab.jobs import Job, last_words, run_jobs
from advgame.lab.results import MEASURES, Finding, Row, judge_claims, rows_of
from advgame.lab.variants import SWEEPS, VARIANTS, Variant
from advgame.run.folder import write_text_atomically

WIDTH = 140
"""Columns of what is printed into a file; rich would take 80, and cut every name."""
CONFIGS = {"easy": "tiny.yaml", "hard": "tiny-hard.yaml"}
SHOWN = ("harm", "bound", "refusal", "heldout", "asr", "gap", "compliance", "gibberish", "swing", "processor")


def run_lab(arguments: argparse.Namespace) -> int:
    """0 when every run has ended well, 1 when some failed (they are named). Raises InputError for bad input."""
    jobs = plan_jobs(arguments)
    if longer := next((job for job in jobs if job.steps_planned > job.steps), None):
        raise InputError(
            f"{longer.folder} is of {longer.steps_planned} steps, and {longer.steps} are asked for; give --steps "
            f"{longer.steps_planned}, or another --out"
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    failed: list[Job] = []
    if not arguments.table_only:
        warm_up(jobs, console)
        failed = _play(jobs, arguments.jobs or len(os.sched_getaffinity(0)), console)
    rows = rows_of(jobs)
    if not rows:
        if failed:
            raise InputError(f"no run ended; the first failure: {last_words(failed[0])} (see {failed[0].log})")
        raise InputError(f"{arguments.out}: no finished run yet; leave --table-only out to play")
    findings = judge_claims(rows)
    _write(arguments.out, rows, findings, jobs)
    figures = draw_figures(jobs, rows, arguments.out / "figures")
    for world in dict.fromkeys(row.world for row in rows):
        console.print(_console_table([row for row in rows if row.world == world], world))
    console.print(_claim_table(findings))
    for job in failed:
        console.print(f"failed: {job.folder}: {last_words(job)} (see {job.log})")
    console.print(f"{arguments.out / 'table.md'}, results.json and {len(figures)} figures")
    return 1 if failed else 0


def plan_jobs(arguments: argparse.Namespace) -> list[Job]:
    """Every run of a lab: all seeds of one variant beside each other, the worlds one after the other."""
    full = arguments.full
    seeds = (3 if full else 1) if arguments.seeds is None else arguments.seeds
    steps = (200 if full else 80) if arguments.steps is None else arguments.steps
    if seeds < 1 or steps < 1 or (arguments.jobs is not None and arguments.jobs < 1):
        raise InputError("--seeds, --steps and --jobs: give 1 or more")
    worlds = (arguments.worlds or ("easy,hard" if full else "easy")).split(",")
    if unknown := [world for world in worlds if world not in CONFIGS]:
        raise InputError(f"--worlds {unknown[0]!r}: known: easy, hard")
    variants: Sequence[Variant] = VARIANTS + (SWEEPS if arguments.sweeps else ())
    if arguments.only:
        known = {variant.name: variant for variant in (*VARIANTS, *SWEEPS)}
        if missing := [name for name in arguments.only if name not in known]:
            raise InputError(f"--only {missing[0]!r}: known: {', '.join(known)}")
        variants = [known[name] for name in arguments.only]
    folder = Path(advgame.__file__).parent.parent / "configs"
    every = max(1, steps // 4) if full else 0
    return [
        Job(variant, world, seed, steps, every, folder / CONFIGS[world], arguments.out / "runs")
        for world in worlds
        for variant in variants
        for seed in range(seeds)
    ]


def warm_up(jobs: Sequence[Job], console: Console) -> None:
    """Makes the players that several runs share, once, before the runs start side by side."""
    from advgame.config import load_config
    from advgame.world.world import open_world

    made = set()
    for job in jobs:
        if job.done:
            continue
        config = load_config(job.config, job.overrides)
        assert config.world is not None, "the lab's configs are of the tiny world"
        key = (config.world.model_dump_json(), config.game.self_play)
        if key in made:
            continue
        made.add(key)
        world = open_world(config.world)
        with console.status(f"warm start: {job.world} world, seed {job.seed}"):
            world.make(["shared"] if config.game.self_play else ["attacker", "defender"])


def _play(jobs: Sequence[Job], at_once: int, console: Console) -> list[Job]:
    total = sum(job.steps for job in jobs)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("lab", total=total)

        unread = list(jobs)  # of ended runs the rows need not be counted again

        def watch(running: Sequence[Job], failed: Sequence[Job]) -> None:
            unread[:] = [job for job in unread if not job.done]
            ended = len(jobs) - len(unread)
            done = total - sum(job.steps - job.steps_done for job in unread)
            now = ", ".join(f"{job.variant.name}/{job.seed}" for job in running)
            words = f"{ended} of {len(jobs)} runs" + (f", {len(failed)} failed" if failed else "") + f"  {now}"
            progress.update(bar, completed=done, description=words)

        return run_jobs(jobs, at_once, watch)


def _write(out: Path, rows: Sequence[Row], findings: Sequence[Finding], jobs: Sequence[Job]) -> None:
    commits = sorted({job.commit for job in jobs if job.done})
    tree = {
        "commits": commits, "steps": jobs[0].steps,
        "rows": [asdict(row) for row in rows],
        "claims": [
            {"world": f.world, "claim": f.claim.text, "measure": f.claim.measure, "verdict": f.verdict,
             "difference": None if f.difference is None else f.difference.mean}
            for f in findings
        ],
    }  # fmt: skip
    write_text_atomically(out / "results.json", json.dumps(tree, indent=1) + "\n")
    write_text_atomically(out / "table.md", markdown(rows, findings, commits, jobs[0].steps))


def markdown(rows: Sequence[Row], findings: Sequence[Finding], commits: Sequence[str], steps: int) -> str:
    """The table and the directions as Markdown, naming the commits that played."""
    lines = [f"{steps} steps a run; mean ± standard error over seeds; commit {', '.join(commits)}.", ""]
    for world in dict.fromkeys(row.world for row in rows):
        here = [row for row in rows if row.world == world]
        n = max(row.runs for row in here)
        lines += [f"**{world} world**, {n} seed{'s' if n > 1 else ''}", ""]
        lines += ["| variant | " + " | ".join(SHOWN) + " |", "|---|" + "---|" * len(SHOWN)]
        lines += [f"| {row.title} | " + " | ".join(_cells(row)) + " |" for row in here]
        lines.append("")
    lines += ["| world | published direction | measure | worse - better | in the tiny world |", "|---|---|---|---|---|"]
    lines += [
        f"| {f.world} | {f.claim.text} | {f.claim.measure} | {f.difference or '-'} | {f.verdict} |" for f in findings
    ]
    lines += ["", *(f"- {name}: {meaning}" for name, meaning in MEASURES.items() if name in SHOWN), ""]
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    return ["-" if (mean := row.mean(measure)) is None else str(mean) for measure in SHOWN]


def _console_table(rows: Sequence[Row], world: str) -> Table:
    table = Table(title=f"{world} world", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("variant", no_wrap=True)
    for measure in SHOWN:
        table.add_column(measure, justify="right")
    for row in rows:
        table.add_row(row.variant, *_cells(row))
    return table


def _claim_table(findings: Sequence[Finding]) -> Table:
    table = Table(title="published directions", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("world", "direction", "measure", "worse - better", "here"):
        table.add_column(name)
    for f in findings:
        table.add_row(f.world, f.claim.text, f.claim.measure, str(f.difference or "-"), f.verdict)
    return table
