"""Runs of the lab: one child process a run, as many at once as there are cores, each resumable by itself.

The children are forked from a server that has imported what a run needs: that takes a processor 8 s, for each of a
hundred runs.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import yaml

from advgame import interrupts
from advgame.environ import variables
from advgame.lab.variants import Variant

ALONE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
"""The environment of every run: the cores are shared out among runs, and their players are made beforehand."""


@dataclass(frozen=True)
class Job:
    """One run: a variant, a world, a seed. Its folder is <root>/<world>/<variant>/seed<k>."""

    variant: Variant
    world: str
    seed: int
    steps: int
    exact_every: int
    config: Path
    root: Path

    @property
    def folder(self) -> Path:
        return self.root / self.world / self.variant.name / f"seed{self.seed}"

    @property
    def log(self) -> Path:
        return self.root.with_name("logs") / f"{self.world}-{self.variant.name}-seed{self.seed}.txt"

    @property
    def done(self) -> bool:
        """Ended, and with as many steps as asked for now."""
        return (self.folder / "summary.json").is_file() and self.steps_done >= self.steps

    @property
    def steps_planned(self) -> int:
        """Of the run that lies there; 0 without one."""
        try:
            tree = yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8"))
            return int(tree["run"]["steps"])
        except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
            return 0

    @property
    def steps_done(self) -> int:
        """Steps that its metrics hold; the rows after the last step are of the final evaluation."""
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                return min(self.steps, sum(1 for _ in file))
        except OSError:
            return 0

    @property
    def commit(self) -> str:
        """Of the code that started it, "+" if files had changed; "unknown" outside a repository."""
        try:
            start = json.loads((self.folder / "environment.json").read_text(encoding="utf-8"))["starts"][0]
        except (OSError, ValueError, LookupError):
            return "unknown"
        return (start["git_commit"] or "unknown")[:12] + ("+" if start["git_dirty"] else "")

    @property
    def overrides(self) -> list[str]:
        return [
            "--run.seed", str(self.seed), "--world.seed", str(self.seed), "--run.steps", str(self.steps),
            "--run.exact_every", str(self.exact_every), "--run.validate_every", str(self.exact_every),
            "--run.tensorboard", "false", *self.variant.words,
        ]  # fmt: skip

    def words(self) -> list[str]:
        """What `advgame` is told: a fresh start, or a resumption where a checkpoint lies."""
        checkpoints = self.folder / "checkpoints"
        if checkpoints.is_dir() and any(checkpoints.glob("step-*")):
            return ["resume", str(self.folder), "--quiet", *self.overrides]
        if self.folder.exists():
            shutil.rmtree(self.folder)  # it ended before its first checkpoint
        placed = ["--run.root", str(self.folder.parent), "--run.name", self.folder.name]
        return ["train", str(self.config), "--quiet", *placed, *self.overrides]


@dataclass
class Running:
    job: Job
    process: ForkServerProcess


def run_jobs(jobs: Sequence[Job], at_once: int, watch: Callable[[Sequence[Job], Sequence[Job]], None]) -> list[Job]:
    """Runs what is not done yet; returns the jobs that failed. `watch(running, failed)` is called twice a second.

    On Ctrl-C the children are asked to stop as if Ctrl-C had been theirs (they save a checkpoint), and
    KeyboardInterrupt goes on.
    """
    waiting = [job for job in jobs if not job.done]
    running: list[Running] = []
    failed: list[Job] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(_start(waiting.pop(0)))
            time.sleep(0.5)
            for one in [r for r in running if not r.process.is_alive()]:
                running.remove(one)
                if one.process.exitcode != 0 or not one.job.done:
                    failed.append(one.job)
            watch([r.job for r in running], failed)
    except BaseException:
        for one in running:
            with suppress(ProcessLookupError):
                if one.process.pid is not None and one.process.is_alive():
                    os.kill(one.process.pid, signal.SIGINT)
        for one in running:
            one.process.join()
        raise
    return failed


def _start(job: Job) -> Running:
    words = job.words()
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    job.log.parent.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["advgame.lab.preload"])
    with interrupts.held(), variables(ALONE):  # the server inherits both; libraries read ALONE when they are imported
        process = context.Process(target=_play, args=(words, job.log.absolute(), Path.cwd(), dict(os.environ)))
        process.start()
    return Running(job, process)


def _play(words: list[str], log: Path, folder: Path, environment: Mapping[str, str]) -> None:
    """In the child: `advgame WORDS`, both outputs into `log`; the server's folder and environment may be older."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # its own session: a Ctrl-C at the terminal reaches the lab alone, which then tells each child once
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["advgame", *words]
    from advgame.cli import main

    sys.exit(main(words))


def last_words(job: Job) -> str:
    """The last line of a failed run's log."""
    try:
        lines = job.log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        return str(error)
    return next((line.strip() for line in reversed(lines) if line.strip()), "no message")
