"""`advgame redteam`: arguments, one campaign (or, with --transfer, a matrix of them), and the line that it prints."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from advgame.errors import InputError

PURPOSE = "--purpose: say what this red-teaming is for (it is recorded with the results, which are controlled)"


def add_redteam_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `advgame redteam`."""
    parser.add_argument(
        "--attacker",
        action="append",
        required=True,
        metavar="MODEL",
        help="model folder, run, vllm:PATH or URL#NAME; with --transfer [NAME=][STRATEGY@]MODEL, may be repeated",
    )
    parser.add_argument(
        "--target",
        action="append",
        required=True,
        metavar="MODEL",
        help="the model that is attacked, named likewise; with --transfer [NAME=]MODEL, may be repeated",
    )
    parser.add_argument("--strategy", help="attacker (best of k, the default), pair, tap, attacker+pair, attacker+tap")
    parser.add_argument(
        "--seeds",
        type=Path,
        required=True,
        metavar="FILE",
        help="goals, or `world` (the tiny world's); benign rows are left out",
    )
    parser.add_argument("--purpose", default="", help="what this is for; recorded")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder; an earlier run in it goes on")
    parser.add_argument("--judge", metavar="MODEL", help="guides the search; rule (default in the tiny world), phrases")
    parser.add_argument("--classifier", metavar="MODEL", help="has the last word: KIND@MODEL, phrases, or world")
    parser.add_argument("--driver", metavar="MODEL", help="attacker+pair/tap: who goes on from the rewrites")
    parser.add_argument("--writer", choices=("auto", "game", "json"), default="auto", help="PAIR/TAP attack format")
    parser.add_argument("--k", type=int, default=8, help="attacker: samples a seed (default 8)")
    parser.add_argument(
        "--preset", default="code", help="PAIR's defaults: code 3x3, harmbench 20x3, jailbreakbench 30x3"
    )
    for name in ("streams", "turns", "depth", "branching", "width", "roots", "keep-last", "retries"):
        parser.add_argument(f"--{name}", type=int, metavar="N", help="overrides the preset")
    parser.add_argument("--max-queries", type=int, metavar="N", help="answers of the target in all; default: no limit")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="tokens of all models in all; default: no limit")
    parser.add_argument("--queries-per-seed", type=int, metavar="N", help="most target queries a seed")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N seeds")
    parser.add_argument(
        "--classify",
        choices=("best", "all"),
        help="the submitted attack (default), or every one (then faithfulness too; default of --transfer)",
    )
    parser.add_argument(
        "--sampling", action="append", default=[], metavar="ROLE=T,P,N", help="temperature, top-p, tokens of a role"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="local models; default: by device")
    parser.add_argument("--in-flight", type=int, default=32, metavar="N", help="seeds at a time (default 32)")
    parser.add_argument("--seed", type=int, default=0, help="decides every sampling stream")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the folder")
    parser.add_argument("--transfer", action="store_true", help="every attacker against every target, as a matrix")
    parser.add_argument("--sample", type=int, metavar="N", help="--transfer: attacks that diversity looks at (64)")
    parser.add_argument("--embed", metavar="MODEL", help="--transfer: local model whose hidden states give the cosine")
    parser.add_argument("--parallel", type=int, metavar="N", help="--transfer: cells at a time (default 4)")


ONE, MANY = ("strategy", "max_queries", "max_tokens"), ("sample", "embed", "parallel")
"""Arguments of a single campaign, and of a matrix of them."""


def run_redteam(arguments: argparse.Namespace) -> int:
    """Runs or continues a campaign or a matrix. 0: done, or stopped by user or budget; 1: some model failed."""
    for name in ONE if arguments.transfer else MANY:
        if getattr(arguments, name) is not None:
            goes = "does not go with --transfer" if arguments.transfer else "goes with --transfer only"
            raise InputError(f"--{name.replace('_', '-')}: {goes}; see advgame redteam --help")
    if arguments.transfer:
        from advgame.redteam.transfer import run_transfer

        return run_transfer(arguments)
    for name in ("attacker", "target"):
        if len(getattr(arguments, name)) > 1:
            raise InputError(f"--{name}: give one; several against several are played with --transfer")
    purpose = stated_purpose(arguments.purpose, arguments.out)

    from advgame.redteam.goals import WORLD, read_goals
    from advgame.redteam.plan import check_seeds, goals_of_world, make_budget, make_plan

    limit = positive(arguments.limit, "limit")
    goals = None if arguments.seeds == WORLD else read_goals(arguments.seeds, limit)
    plan = make_plan(
        strategy=arguments.strategy or "attacker",
        attacker=arguments.attacker[0],
        target=arguments.target[0],
        **plan_options(arguments),
    )
    goals = goals or goals_of_world(plan, limit)
    check_seeds(plan, goals.seeds)
    budget = make_budget(arguments.max_queries, arguments.max_tokens)

    from advgame.redteam.engagement import engage

    notes = [f"{goals.benign} benign rows are left out: red-teaming attacks harmful seeds"] if goals.benign else []
    outcome = asyncio.run(
        engage(
            plan,
            goals.seeds,
            arguments.out,
            purpose,
            budget,
            dtype=arguments.dtype,
            notes=notes,
            view=not arguments.quiet,
        )
    )
    print(arguments.out)
    outcome.raise_failures()
    return 0


def plan_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments that single campaigns and matrices share, as keywords of `make_plan`."""
    names = ("streams", "turns", "depth", "branching", "width", "roots", "keep_last", "retries")
    return {
        "judge": arguments.judge,
        "classifier": arguments.classifier,
        "preset": arguments.preset,
        "driver": arguments.driver,
        "writer": arguments.writer,
        "k": positive(arguments.k, "k"),
        "search": {n: v for n in names if (v := getattr(arguments, n)) is not None},
        "seed_queries": positive(arguments.queries_per_seed, "queries-per-seed"),
        "classify_all": (arguments.classify or ("all" if arguments.transfer else "best")) == "all",
        "in_flight": positive(arguments.in_flight, "in-flight"),
        "run_seed": arguments.seed,
        "sampling": parse_sampling(arguments.sampling),
    }


def stated_purpose(given: str, out: Path) -> str:
    """As given, as an earlier run in `out` stated it, or as answered at a terminal; InputError without any."""
    from advgame.redteam.folder import recorded_purpose

    purpose = given.strip() or recorded_purpose(out)
    if not purpose and sys.stdin.isatty():
        purpose = input("Red-teaming makes controlled artifacts. What is this run for? ").strip()
    if not purpose:
        raise InputError(PURPOSE)
    return purpose


def positive(value: int | None, name: str) -> Any:
    if value is not None and value < 1:
        raise InputError(f"--{name}: {value} is too few; give 1 or more")
    return value


def parse_sampling(words: Sequence[str]) -> dict[str, Any]:
    """`attacker=1,0.9,500` -> {"attacker": Sampling(1.0, 0.9, 500)}."""
    from advgame.redteam.plan import SAMPLING
    from advgame.rollout.engine import Sampling

    made = {}
    roles = (*SAMPLING, "driver", "classifier")
    for word in words:
        role, _, numbers = word.partition("=")
        if role not in roles:
            raise InputError(f"--sampling: unknown role {role!r}; choose one of {', '.join(roles)}")
        try:
            temperature, top_p, tokens = numbers.split(",")
            how = Sampling(float(temperature), float(top_p), int(tokens))
            if not (how.temperature >= 0 and 0 < how.top_p <= 1 and how.max_tokens > 0):
                raise ValueError("out of range")
        except ValueError:
            raise InputError(f"--sampling: {word!r} is not ROLE=T,P,N like target=0,1,150") from None
        made[role] = how
    return made


@contextmanager
def gentle_stop(stop: Any, tell: Any) -> Iterator[None]:
    """The first Ctrl-C calls `stop` and lets what is paid for arrive; the second one ends everything."""
    loop = asyncio.get_running_loop()

    def first() -> None:
        stop()
        tell("stopping: waiting for the answers in flight (Ctrl-C again to leave them)")
        loop.remove_signal_handler(signal.SIGINT)

    try:
        loop.add_signal_handler(signal.SIGINT, first)
    except (NotImplementedError, RuntimeError, ValueError):  # no main thread, no POSIX signals
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def nonzero(counters: Counter[str]) -> dict[str, int]:
    return {name: counters[name] for name in sorted(counters) if counters[name]}
