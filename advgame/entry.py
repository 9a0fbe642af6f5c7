"""`advgame train`, `resume` and `config`: settings are checked before anything heavy is imported."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from advgame.config import Config


def run_train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Plays one run a seed; prints the folders."""
    from advgame.config import load_config
    from advgame.errors import InputError

    if arguments.seeds < 1:
        raise InputError("--seeds: give 1 or more")
    config = load_config(arguments.config, placed(arguments, overrides))
    if arguments.seeds > 1 and config.run.name is not None:
        raise InputError("run.name: several seeds need a folder each; leave the name out")

    from rich.console import Console

    from advgame.run.commands import start, summarise_seeds

    folders = []
    with _ranks(config) as leads:
        for offset in range(arguments.seeds if leads else 0):
            seeded = config.model_copy(deep=True)
            seeded.run.seed += offset
            if seeded.world is not None:
                seeded.world.seed += offset
            folders.append(start(seeded, quiet=arguments.quiet))
            if not (folders[-1] / "summary.json").is_file():
                break  # stopped by Ctrl-C
    finished = [folder for folder in folders if (folder / "summary.json").is_file()]
    if len(finished) > 1:
        summarise_seeds(finished, Console(quiet=arguments.quiet))
    for folder in folders:
        print(folder)
    return 0


def run_resume(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Continues a run; prints its folder."""
    from advgame.run.commands import config_of, resume

    config = config_of(arguments.run, placed(arguments, overrides))
    with _ranks(config) as leads:
        if leads:
            print(resume(arguments.run, config, quiet=arguments.quiet))
    return 0


def _ranks(config: Config) -> AbstractContextManager[bool]:
    """Inside, whether this process runs the command; under torchrun the others only train, and see False at the end."""
    from advgame.learn.zero_config import check_backend

    check_backend(config)
    if config.learn.backend == "plain" or config.cluster.trainer_ranks is not None:
        return nullcontext(True)
    from advgame.learn.team import joined

    return joined(config.run.threads, config.learn.deepspeed.attacker_ranks)


def placed(arguments: argparse.Namespace, overrides: list[str]) -> list[str]:
    """The overrides with `--cluster` written out."""
    return overrides if arguments.cluster is None else ["--cluster.placement", arguments.cluster, *overrides]


def run_config(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Prints settings; runs nothing."""
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
