"""The arguments of `advgame lab`, apart from the command so that `--help` needs no package."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_lab_arguments(parser: argparse.ArgumentParser) -> None:
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="easy world, 1 seed, 80 steps (the default; about 10 minutes)"
    )
    size.add_argument("--full", action="store_true", help="both worlds, 3 seeds, 200 steps (hours; may be interrupted)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/lab"), help="where runs, table and figures go (runs/lab)"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds of each variant")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of each run")
    parser.add_argument("--worlds", metavar="NAMES", help="easy, hard, or easy,hard")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants only")
    parser.add_argument("--sweeps", action="store_true", help="also sweep learning rate, decay, judge noise and bias")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at once (default: the cores this process may use)")
    parser.add_argument("--table-only", action="store_true", help="play nothing; table and figures of what is there")
