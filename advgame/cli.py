"""The command line: `advgame COMMAND`. Bad input: one line on stderr, exit code 2."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from advgame import __version__
from advgame.doctor import add_doctor_arguments
from advgame.evals.command import add_audit_arguments, add_eval_arguments
from advgame.game.dataset import add_data_arguments
from advgame.lab.arguments import add_lab_arguments
from advgame.plan.arguments import add_plan_arguments
from advgame.redteam.command import add_redteam_arguments
from advgame.report.arguments import add_report_arguments, add_resources_arguments

MISSING = {
    "pydantic": "train", "yaml": "train", "transformers": "train", "rich": "train", "tensorboard": "train",
    "pyarrow": "train", "matplotlib": "train", "safetensors": "train", "jaxtyping": "train", "numpy": "train",
}  # fmt: skip


class OneLineParser(argparse.ArgumentParser):
    """Complains in one line, like the rest of the tool, and takes no abbreviated options for overrides."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"advgame: {message}; see {self.prog} --help\n")


@dataclass(frozen=True)
class Command:
    """One subcommand. run: "module:function", imported when called; overrides: it takes `--section.field value`."""

    name: str
    help: str
    description: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: str
    overrides: bool = False


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML file, for example configs/tiny.yaml")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="play N seeds, one after another (default 1)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the run folder")
    _cluster_argument(parser)


def _cluster_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", choices=("local", "ray"), help="where vLLM engines run (cluster.placement)")


def _resume_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the run folder")
    _cluster_argument(parser)


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, nargs="?", help="YAML file (default: no file, the defaults)")
    parser.add_argument("--show", action="store_true", help="print the resolved tree as YAML (the default)")
    parser.add_argument("--fields", action="store_true", help="print every field with its default and meaning")


def _publish_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", type=Path, required=True, metavar="MODEL", help="Hugging Face model folder")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="workers of an engine (default 1)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="the engine's weights")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the plan as JSON")
    parser.add_argument("--diff", type=Path, metavar="FILE", help="compare with a saved plan; exit code 1: differs")


COMMANDS = (
    Command(
        "train", "play and learn from a config",
        "Starts a run. Every setting can be overridden: --section.field value (all of them: advgame config --fields).",
        _train_arguments, "advgame.entry:run_train", overrides=True,
    ),
    Command(
        "resume", "continue a run", "Continues a run where it stopped.",
        _resume_arguments, "advgame.entry:run_resume", overrides=True,
    ),
    Command(
        "report", "write an HTML page about runs",
        "Writes one self-contained HTML file: curves, signs of failure, and a browser of trees.",
        add_report_arguments, "advgame.report.command:run_report",
    ),
    Command(
        "resources", "compare what runs used at equal quality",
        "Adds up time, memory and energy of runs to the step at which each was first good enough.",
        add_resources_arguments, "advgame.report.resources:run_resources",
    ),
    Command(
        "config", "show settings", "Shows settings; runs nothing.",
        _config_arguments, "advgame.entry:run_config", overrides=True,
    ),
    Command(
        "data", "describe, clean and split a seed file", "Describes, cleans and splits a seed file.",
        add_data_arguments, "advgame.game.dataset:run_data",
    ),
    Command(
        "doctor", "check this machine", "Looks at versions, GPUs, memory, disk and ports; changes nothing.",
        add_doctor_arguments, "advgame.doctor:run_doctor", overrides=True,
    ),
    Command(
        "plan", "split GPUs among trainer and engines",
        "Estimates memory, time and energy of a config on so many GPUs; loads no weights.",
        add_plan_arguments, "advgame.plan.command:run_plan", overrides=True,
    ),
    Command(
        "lab", "play every variant in the tiny world",
        "Plays the variants of the game over seeds and tables them; continues where it stopped.",
        add_lab_arguments, "advgame.lab.command:run_lab",
    ),
    Command(
        "eval", "measure safety, over-refusal and utility of models",
        "Answers a suite's prompts with models, classifies and scores the answers; continues where it stopped.",
        add_eval_arguments, "advgame.evals.command:run_eval",
    ),
    Command(
        "eval-judge", "audit a judge or classifier against labels",
        "Measures agreement, position and length bias, and consistency of a judge.",
        add_audit_arguments, "advgame.evals.audit_command:run_eval_judge",
    ),
    Command(
        "redteam", "attack a model and measure what gets through",
        "Attacks a target within a budget, on the record (--transfer: every attacker against every target); "
        "the same command continues a run.",
        add_redteam_arguments, "advgame.redteam.command:run_redteam",
    ),
    Command(
        "publish", "show how weights reach an engine",
        "Records the copy plan of a model from vLLM's own loader; writes no weights.",
        _publish_arguments, "advgame.publish.command:run_publish",
    ),
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="advgame", description="Trains an Attacker and a Defender against each other with preference losses."
    )
    parser.add_argument("--version", action="version", version=f"advgame {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.arguments(commands.add_parser(command.name, help=command.help, description=command.description))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done (or stopped by Ctrl-C and saved), 2 bad input, 1 a failure."""
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:  # `advgame config --fields | head`
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        return _fail("stopped", 130)
    except ModuleNotFoundError as error:
        name = (error.name or "").split(".")[0]
        if name not in MISSING:
            raise
        return _fail(f"the package {name} is missing; install it with: pip install 'advgame[{MISSING[name]}]'")


def _main(argv: list[str]) -> int:
    from advgame.errors import DiskFull, InputError, RanksDied
    from advgame.rollout.engine import EngineError

    arguments, overrides = build_parser().parse_known_args(argv)
    try:
        command = next(c for c in COMMANDS if c.name == arguments.command)
        module, _, function = command.run.partition(":")
        run = getattr(importlib.import_module(module), function)
        if command.overrides:
            return int(run(arguments, overrides))
        if overrides:
            raise InputError(f"unexpected argument {overrides[0]!r}; see advgame {arguments.command} --help")
        return int(run(arguments))
    except InputError as error:
        return _fail(str(error))
    except (EngineError, RanksDied, DiskFull) as error:
        return _fail(str(error), 1)
    except BaseExceptionGroup as group:  # a tree's failure, in the wrapping of the task group that played it
        known = group.subgroup((InputError, EngineError))
        if known is None:
            raise
        first: BaseException = known
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        return _fail(str(first), 2 if isinstance(first, InputError) else 1)


def _fail(message: str, code: int = 2) -> int:
    if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":
        return code  # under torchrun, rank 0 says it
    print(f"advgame: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
