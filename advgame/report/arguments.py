"""The words of `advgame report` and `advgame resources`, without their work: the command line loads neither."""

from __future__ import annotations

import argparse
from pathlib import Path

MOST_TREES = 100_000
GOOD_ENOUGH = ("exploitability<=0.1", "worst_over_refusal<=0.1")
"""The target of the tiny world."""


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the file to write (default: report.html in the run's folder, or here for several runs)",
    )
    parser.add_argument(
        "--trees",
        type=int,
        default=MOST_TREES,
        metavar="N",
        help=f"most trees that the browser holds of each run, evenly spread; 0: aggregates only (default {MOST_TREES})",
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but the file")


def add_resources_arguments(parser: argparse.ArgumentParser) -> None:
    """`advgame resources`."""
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run folders; seeds of one parent are a group"
    )
    parser.add_argument(
        "--until", action="append", metavar="METRIC<=X",
        help="what is good enough: a metric of the run, <= or >=, a number; several must hold in one evaluation "
        f"(default: {' and '.join(GOOD_ENOUGH)})",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
