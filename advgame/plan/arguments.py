"""The arguments of `advgame plan`, apart from the command so that `--help` needs no package."""

from __future__ import annotations

import argparse
from pathlib import Path

from advgame.plan.assumptions import HARDWARE


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML file, for example configs/qwen2.5-7b.yaml")
    parser.add_argument("--gpus", type=int, default=16, metavar="N", help="GPUs to split (default 16)")
    parser.add_argument("--gpu", choices=sorted(HARDWARE), default="h200", help="kind of GPU (default h200)")
    parser.add_argument(
        "--layout", metavar="T+A+D+J", help="judge this split beside the best: trainer + Attacker + Defender + judge, "
        "for example 8+1+1+6, or 8+1+1+3x2 for judges of two GPUs",
    )  # fmt: skip
    parser.add_argument("--ahead", type=int, choices=(0, 1), default=1, help="play the next batch while training (1)")
    parser.add_argument("--assume", action="append", default=[], metavar="NAME=VALUE", help="replace an assumption")
    parser.add_argument("--simulate", action="store_true", help="scale the split and the batch up, show what limits")
    parser.add_argument(
        "--like", type=Path, action="append", default=[], metavar="RUN",
        help="simulate the config on the machine of this measured run, with its lengths and times (again: more runs)",
    )  # fmt: skip
    parser.add_argument(
        "--cores", type=int, metavar="N", help="with --like: cores of that machine, or of a whole cluster (default: "
        "as recorded where the run was started)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the drawn lengths (default 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
