"""`advgame report RUN [RUN ...]`: one HTML file about runs, to be opened in a browser."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from advgame.errors import InputError
from advgame.report.arguments import MOST_TREES
from advgame.report.collect import PACKED_LIMIT, RunData, collect, open_run
from advgame.report.page import chunk_element, write_page
from advgame.run.live import Stage
from advgame.run.recorder import tree_files

MOST_RUNS = 8
"""As many as there are colours that can be told apart."""


def run_report(arguments: argparse.Namespace) -> int:
    """Writes the page and prints its path. Raises InputError before anything long begins."""
    out = write_report(arguments.runs, arguments.out, most_trees=arguments.trees, quiet=arguments.quiet)
    print(out)
    return 0


def write_report(paths: list[Path], out: Path | None, *, most_trees: int = MOST_TREES, quiet: bool = False) -> Path:
    """Writes the page about the runs in `paths`; returns its path."""
    if most_trees < 0:
        raise InputError("--trees: give 0 or more")
    if len(paths) > MOST_RUNS:
        raise InputError(f"{len(paths)} runs: a page compares at most {MOST_RUNS}; write several")
    folders = [open_run(path) for path in paths]
    out = out or (paths[0] / "report.html" if len(paths) == 1 else Path("report.html"))
    _check_writable(out)
    called = names_of([folder.path.resolve() for folder in folders])
    steps = [_steps(folder.trees) for folder in folders]
    totals = {f"{n}: {name}": count for n, (name, count) in enumerate(zip(called, steps, strict=True), 1)}
    runs: list[RunData] = []
    # Trees go through a file, so that charts can stand before them in the page, and memory stays flat.
    with (
        tempfile.TemporaryFile("w+", encoding="ascii", dir=out.parent) as chunks,
        Stage("reading", totals, not quiet, console=Console(stderr=True)) as stage,
    ):
        for number, (folder, name, part) in enumerate(zip(folders, called, totals, strict=True)):

            def write(chunk: int, text: str, number: int = number) -> None:
                chunks.write(chunk_element(number, chunk, text))

            def progress(files: int, part: str = part) -> None:
                stage.update(part, files)

            limits = {"most_trees": most_trees, "most_characters": PACKED_LIMIT // len(folders)}
            runs.append(collect(folder, write, name=name, **limits, progress=progress))
        write_page(out, runs, chunks, " · ".join(run.name for run in runs))
    for run in runs:
        for warning in run.warnings:
            Console(stderr=True, quiet=quiet).print(f"{run.name}: {warning}", markup=False, soft_wrap=True)
    return out


def names_of(paths: Sequence[Path]) -> list[str]:
    """The ends of `paths` that tell them apart: `seed0` of one run, `dpo-md/seed0` beside `sequential/seed0`."""
    counts = range(1, max(len(path.parts) for path in paths) + 1)
    ends = ([str(Path(*path.parts[-count:])) for path in paths] for count in counts)
    return next(some for some in ends if len(set(some)) == len(set(paths)))


def _check_writable(out: Path) -> None:
    if out.is_dir():
        raise InputError(f"{out}: is a folder; give --out a file, for example {out / 'report.html'}")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such folder; make it first, or give --out another")
    if not os.access(out.parent, os.W_OK):
        raise InputError(f"{out.parent}: cannot be written; give --out another place")


def _steps(trees: Path) -> int:
    return len(tree_files(trees)) if trees.is_dir() else 0
