"""The words of `advgame report`, apart from its work so that the command line loads nothing for them."""

from __future__ import annotations

import argparse
from pathlib import Path

MOST_TREES = 100_000


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
