"""The command line: `advgame COMMAND`. Bad input: one line on stderr, exit code 2."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

from advgame import __version__
from advgame.doctor import add_doctor_arguments
from advgame.game.dataset import add_data_arguments
from advgame.lab.arguments import add_lab_arguments
from advgame.plan.arguments import add_plan_arguments

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


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="advgame", description="Trains an Attacker and a Defender against each other with preference losses."
    )
    parser.add_argument("--version", action="version", version=f"advgame {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="play and learn from a config",
        description="Starts a run. Every setting can be overridden: --section.field value "
        "(all of them: advgame config --fields).",
    )
    train.add_argument("config", type=Path, help="YAML file, for example configs/tiny.yaml")
    train.add_argument("--seeds", type=int, default=1, metavar="N", help="play N seeds, one after another (default 1)")
    train.add_argument("--quiet", action="store_true", help="print nothing but the run folder")

    resume = commands.add_parser("resume", help="continue a run", description="Continues a run where it stopped.")
    resume.add_argument("run", type=Path, help="the run's folder")
    resume.add_argument("--quiet", action="store_true", help="print nothing but the run folder")

    config = commands.add_parser("config", help="show settings", description="Shows settings; runs nothing.")
    config.add_argument("config", type=Path, nargs="?", help="YAML file (default: no file, the defaults)")
    config.add_argument("--show", action="store_true", help="print the resolved tree as YAML (the default)")
    config.add_argument("--fields", action="store_true", help="print every field with its default and meaning")

    add_data_arguments(commands.add_parser("data", help="describe, clean and split a seed file"))

    doctor = commands.add_parser(
        "doctor",
        help="check this machine",
        description="Looks at versions, GPUs, memory, disk and ports; changes nothing.",
    )
    add_doctor_arguments(doctor)

    plan = commands.add_parser(
        "plan",
        help="split GPUs among trainer and engines",
        description="Estimates memory, time and energy of a config on so many GPUs; loads no weights.",
    )
    add_plan_arguments(plan)

    lab = commands.add_parser(
        "lab",
        help="play every variant in the tiny world",
        description="Plays the variants of the game over seeds and tables them; continues where it stopped.",
    )
    add_lab_arguments(lab)

    publish = commands.add_parser(
        "publish",
        help="show how weights reach an engine",
        description="Records the copy plan of a model from vLLM's own loader; writes no weights.",
    )
    publish.add_argument("--plan", type=Path, required=True, metavar="MODEL", help="Hugging Face model folder")
    publish.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="workers of an engine (default 1)")
    publish.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="the engine's weights")
    publish.add_argument("--save", type=Path, metavar="FILE", help="write the plan as JSON")
    publish.add_argument("--diff", type=Path, metavar="FILE", help="compare with a saved plan; exit code 1: differs")
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
    from advgame.errors import InputError
    from advgame.rollout.engine import EngineError

    arguments, overrides = build_parser().parse_known_args(argv)
    try:
        if overrides and arguments.command in ("data", "lab", "publish"):
            raise InputError(f"unexpected argument {overrides[0]!r}; see advgame {arguments.command} --help")
        return COMMANDS[arguments.command](arguments, overrides)
    except InputError as error:
        return _fail(str(error))
    except EngineError as error:
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
    print(f"advgame: {' '.join(message.split())}", file=sys.stderr)
    return code


def _train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from advgame.config import load_config
    from advgame.errors import InputError

    if arguments.seeds < 1:
        raise InputError("--seeds: give 1 or more")
    config = load_config(arguments.config, overrides)
    if arguments.seeds > 1 and config.run.name is not None:
        raise InputError("run.name: several seeds need a folder each; leave the name out")

    from rich.console import Console

    from advgame.run.commands import run_train, summarise_seeds

    folders = []
    for offset in range(arguments.seeds):
        seeded = config.model_copy(deep=True)
        seeded.run.seed += offset
        if seeded.world is not None:
            seeded.world.seed += offset
        folders.append(run_train(seeded, quiet=arguments.quiet))
        if not (folders[-1] / "summary.json").is_file():
            break  # stopped by Ctrl-C
    finished = [folder for folder in folders if (folder / "summary.json").is_file()]
    if len(finished) > 1:
        summarise_seeds(finished, Console(quiet=arguments.quiet))
    for folder in folders:
        print(folder)
    return 0


def _resume(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from advgame.run.commands import run_resume

    print(run_resume(arguments.run, overrides, quiet=arguments.quiet))
    return 0


def _config(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from advgame.config import Config, describe_fields, dump_config, load_config
    from advgame.errors import InputError

    if arguments.fields:
        for name, default, meaning in describe_fields(Config):
            print(f"{name} = {default}\n    {meaning}")
        return 0
    if arguments.config is None:
        raise InputError("give a config file, for example: advgame config configs/tiny.yaml --show")
    print(dump_config(load_config(arguments.config, overrides)), end="")
    return 0


def _data(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from advgame.game.dataset import run_data

    return run_data(arguments)


def _doctor(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from advgame.doctor import run_doctor

    return run_doctor(arguments, overrides)


def _plan(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from advgame.plan.command import run_plan

    return run_plan(arguments, overrides)


def _lab(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from advgame.lab.command import run_lab

    return run_lab(arguments)


def _publish(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from advgame.publish.command import run_publish

    return run_publish(arguments)


COMMANDS = {
    "train": _train, "resume": _resume, "config": _config, "data": _data, "doctor": _doctor, "lab": _lab, "plan": _plan,
    "publish": _publish,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
