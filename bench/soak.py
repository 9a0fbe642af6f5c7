"""A run that is killed again and again: `python -m bench soak [--steps 1000] [--kill-every 50] [--twin] [--out]`.

The real `advgame train` plays the tiny world; at random moments its process is killed with SIGKILL: while it starts,
in the middle of a step, while a checkpoint is written, just after one; or one of its children alone is. `advgame
resume` goes on each time. In the end every step and every tree must be there exactly once and in order, the checkpoints
whole (they are looked at after every kill as well), and no process, listening port, shared memory or temporary file may
be left. `--twin` plays the same run without kills: rows, trees and weights must be the same to the last bit.
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from advgame.config import load_config
from bench import traces
from bench.records import device_name, save
from bench.soak_checks import differences, half_checkpoints, learned_from, played_again, problems

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
START, STEP, WRITE, AFTER, CHILD = (
    "while starting",
    "in a step",
    "writing a checkpoint",
    "after a checkpoint",
    "a child",
)
WEIGHTS = {START: 1, STEP: 3, WRITE: 3, AFTER: 2}
"""How often each is drawn; children are killed as often as all of these together, where a run has some that work."""
SETTINGS = {
    "run.purpose": "a soak test", "run.validate_every": 0, "run.exact_every": 0, "run.checkpoint_every": 10,
    "run.keep_checkpoints": 2, "data.harmful": 2, "data.benign": 2, "data.validation_limit": 8,
}  # fmt: skip
ENGINES = {"rollout.engine": "vllm", "rollout.vllm.cache_gib": 0.25, "rollout.vllm.restarts": 1000}
ORPHANS_S, STALL_S = 20.0, 600.0
"""Longest life of a child whose parent was killed; longest wait for a step, a start included."""


@dataclass
class Found:
    """What was seen beside the run's folder. orphan_s: how long the last child outlived a killed run, at most."""

    kills: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    anew: int = 0
    orphan_s: float = 0.0
    left: list[str] = field(default_factory=list)
    ports: set[tuple[str, int]] = field(default_factory=set)
    shared: set[str] = field(default_factory=set)


class Soak:
    """One run in `root`, killed about every `every` steps (None: never). `words`: its config and settings."""

    def __init__(self, root: Path, words: list[str], *, every: int | None, children: bool, seed: int, nice: int = 0):
        self.root, self.run, self.every = root, root / "run", every
        self.found = Found()
        self._words, self._source, self._nice = words, random.Random(seed), nice
        self._kinds = WEIGHTS | ({CHILD: sum(WEIGHTS.values())} if children else {})
        self._word = secrets.token_hex(8)
        self._seen: set[traces.Process] = set()
        self._starting, self._stepping, self._writing = 5.0, 0.2, 0.05  # seconds; measured as the run goes
        self._born = 0.0
        for name in ("tmp", "log", "cache"):
            (root / name).mkdir(exist_ok=True)

    def play(self, tell: Callable[[str], None] = lambda text: None) -> None:
        """Until the run has ended by itself. Raises RuntimeError with its last words if it failed."""
        while (how := self._life()) is not None:
            self.found.kills[how] += 1
            tell(f"{sum(self.found.kills.values())} killed, {how}; {self._saved()} steps saved")

    def leaks(self) -> list[str]:
        """What is left of all starts, now that the run has ended."""
        found = [*self.found.left]
        traces.wait_for(lambda: traces.still_listening(self.found.ports), 5)
        found += [f"port {port}" for port in sorted(traces.still_listening(self.found.ports))]
        traces.wait_for(lambda: traces.nobodys(self.found.shared), 5)
        found += [f"/dev/shm/{name}" for name in sorted(traces.nobodys(self.found.shared))]
        # torch makes an empty folder for what it would compile
        own = [path for path in (self.root / "tmp").rglob("*") if not path.name.startswith("torchinductor_")]
        found += sorted(path.relative_to(self.root).as_posix() for path in own)
        return found + [path.name for path in (self.root / "cache").rglob(".making-*")]

    def _life(self) -> str | None:
        """One start until it is killed, or ends (None)."""
        process, at = self._start(), self._saved()
        how: str | None = None
        try:
            fresh = True
            while (how := self._moment(process, at, fresh)) == CHILD:
                self.found.kills[CHILD] += 1
                at, fresh = self._at, False
            self._watch(process)
        finally:
            if how is not None or process.poll() is None:
                process.kill()
            process.wait()
            self._bury(process)
        if how is None and process.returncode != 0:
            raise RuntimeError(f"the run ended with {process.returncode}: {self._log.read_text()[-2000:]}")
        return how

    def _start(self) -> subprocess.Popen[bytes]:
        """`advgame train`, or `advgame resume` where there is a run; one that was killed while its folder was made is
        started anew."""
        command = ["resume", str(self.run), "--quiet"]
        if not (self.run / "environment.json").is_file():
            self.found.anew += self.run.exists()
            shutil.rmtree(self.run, ignore_errors=True)
            command = ["train", *self._words, "--run.root", str(self.root), "--run.name", self.run.name, "--quiet"]
        self._log = self.root / "log" / f"{self.found.starts}.txt"
        self.found.starts += 1
        own = {
            traces.VARIABLE: self._word, "TMPDIR": str(self.root / "tmp"), "ADVGAME_CACHE": str(self.root / "cache"),
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        self._born = time.time()
        with self._log.open("wb") as log:
            return subprocess.Popen(
                ["nice", "-n", str(self._nice), sys.executable, "-m", "advgame.cli", *command],
                env=os.environ | own, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip

    def _moment(self, process: subprocess.Popen[bytes], at: int, fresh: bool) -> str | None:
        """Waits for a moment drawn by chance and says which it is; None if the run ends before. A child it kills."""
        if self.every is None:
            process.wait()
            return None
        how = self._source.choices(list(self._kinds), list(self._kinds.values()))[0]
        if how == START and fresh:
            pause = time.time() + self._source.uniform(0, 1.2 * self._starting)
            return how if self._wait(process, lambda: time.time() > pause or self._played(at)) else None
        target = at + self._source.randint(1, 2 * self.every - 1)
        first = time.time()
        if fresh and self._wait(process, lambda: self._played(at)):
            self._starting, first = time.time() - self._born, time.time()
        if not self._wait(process, lambda: self._played(target)):
            return None
        self._at = target
        self._stepping = (time.time() - first) / max(1, target - at)
        if how in (WRITE, AFTER) and not self._checkpoint(process, how):
            return None
        if how in (STEP, START, CHILD):
            time.sleep(self._source.uniform(0, self._stepping))
        self._watch(process)
        if how == CHILD:
            workers = [p for p in self._seen if p.pid != process.pid and "resource_tracker" not in p.command]
            workers = sorted(filter(traces.alive, workers), key=lambda p: p.pid)
            traces.end(self._source.sample(workers, min(1, len(workers))))
        return STEP if how == START else how

    def _checkpoint(self, process: subprocess.Popen[bytes], how: str) -> bool:
        """Waits until one is being written, or has just been; False if the run ends before."""
        folder = self.run / "checkpoints"
        known = set(os.listdir(folder))

        def new(prefix: str) -> bool:
            return any(name.startswith(prefix) for name in set(os.listdir(folder)) - known)

        if not self._wait(process, lambda: new(".tmp-") or new("step-")):
            return False
        began = time.time()
        if how == AFTER:
            if not self._wait(process, lambda: new("step-")):
                return False
            self._writing = max(0.01, time.time() - began)
        time.sleep(self._source.uniform(0, self._writing if how == WRITE else 0.02))
        return True

    def _bury(self, process: subprocess.Popen[bytes]) -> None:
        """Waits for the children of a run that is no more; those that stay are noted, and killed."""

        def orphans() -> set[traces.Process]:
            return set(filter(traces.alive, self._seen)) | set(traces.run_processes(self._word, process.pid))

        self.found.orphan_s = max(self.found.orphan_s, traces.wait_for(orphans, ORPHANS_S))
        left = orphans()
        traces.end(left)
        self.found.left += [f"process {one.command}" for one in left]
        self.found.left += [f"half checkpoint {text}" for text in half_checkpoints(self.run)]
        self._seen.clear()

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        self._seen.update(traces.run_processes(self._word, process.pid))
        pids = [one.pid for one in self._seen]
        self.found.ports |= traces.listeners(pids)
        self.found.shared |= traces.held(pids)

    def _wait(self, process: subprocess.Popen[bytes], there: Callable[[], bool]) -> bool:
        """False if the run ended before. Raises RuntimeError if it stalls."""
        began, newest = time.time(), self._newest()
        while not there():
            if process.poll() is not None:
                return False
            if time.time() - began > STALL_S:
                if self._newest() == newest:
                    raise RuntimeError(f"the run stalls: {self._log.read_text()[-2000:]}")
                began, newest = time.time(), self._newest()
            time.sleep(0.002)
        return True

    def _played(self, step: int) -> bool:
        """Whether this start has played the step; an earlier one's trees may lie there until it sets them aside."""
        try:
            return (self.run / "trees" / f"{step:06d}.jsonl.gz").stat().st_mtime > self._born
        except OSError:
            return False

    def _newest(self) -> str:
        folder = self.run / "trees"
        return max(os.listdir(folder), default="") if folder.is_dir() else ""

    def _saved(self) -> int:
        """Steps of the newest checkpoint, where a resume begins."""
        folder = self.run / "checkpoints"
        return max((int(path.name[5:]) for path in folder.glob("step-*")), default=0)


def soak(root: Path, settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The killed run, the twin if asked for, and what was found; `root` is an empty folder."""
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    config = load_config(options.config, words)
    words, steps = [str(options.config.resolve()), *words], config.run.steps
    began = time.time()
    children = options.engine == "vllm" or config.run.ahead == 1
    one = Soak(root, words, every=options.kill_every, children=children, seed=options.seed, nice=options.nice)
    one.play(lambda text: print(f"  {time.time() - began:6.0f} s  {text}", file=sys.stderr, flush=True))
    seconds, trees = time.time() - began, config.data.harmful + config.data.benign
    wrong = problems(
        one.run, steps=steps, trees=trees, keep=config.run.keep_checkpoints, tensorboard=config.run.tensorboard
    )
    if not (pairs := learned_from(one.run)):
        wrong.append("no pair was learned from: equal weights would say nothing")
    result: dict[str, Any] = {
        "seconds": seconds, "kills": dict(one.found.kills), "starts": one.found.starts, "anew": one.found.anew,
        "played_again": played_again(one.run), "orphan_s": one.found.orphan_s, "trees": trees * steps, "pairs": pairs,
        "listened": sorted({address for address, _ in one.found.ports}), "problems": wrong, "leaks": one.leaks(),
    }  # fmt: skip
    if options.twin:
        began = time.time()
        (root / "whole").mkdir()
        (root / "cache").rename(root / "whole" / "cache")
        whole = Soak(root / "whole", words, every=None, children=False, seed=0, nice=options.nice)
        whole.play()
        result |= {"twin_seconds": time.time() - began, "twin_differs": differences(one.run, whole.run)}
    return result


def report(result: dict[str, Any]) -> list[str]:
    """Prints the table; returns what is wrong."""
    kills = result["kills"]
    print(
        f"  {result['starts']} starts in {result['seconds']:.0f} s; killed {sum(kills.values())} times: "
        + ", ".join(f"{how} {count}" for how, count in kills.items())
    )
    print(
        f"  {result['played_again']} steps played again, {result['trees']} trees recorded, learned from "
        f"{result['pairs']:.0f} pairs"
    )
    print(f"  the last child outlived a killed run by {result['orphan_s']:.2f} s; listened on {result['listened']}")
    twin = "twin_differs" in result
    parts = {"the run's folder": "problems", "left behind": "leaks"} | (
        {"against the twin": "twin_differs"} if twin else {}
    )
    for name, key in parts.items():
        print(f"  {name:20}{'nothing wrong' if not result[key] else f'{len(result[key])} WRONG'}")
        for text in result[key][:20]:
            print(f"    {text}")
    return [text for key in parts.values() for text in result[key]]


def main(arguments: list[str]) -> int:
    """Command line; prints a table, writes JSON with `--out`. Exit code 1: something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench soak", description=__doc__)
    parser.add_argument("--config", type=Path, default=TINY)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--kill-every", type=int, default=50, help="steps between kills, in the mean")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("FIELD", "VALUE"), help="a setting")
    parser.add_argument("--twin", action="store_true", help="compare with a run that nobody kills (transformers)")
    parser.add_argument("--nice", type=int, default=0, help="added to the run's own, so that others go first")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the run and its logs there")
    parser.add_argument("--out", action="store_true", help="write bench/results/soak-<engine>-cpu-<date>.json")
    options = parser.parse_args(arguments)
    settings: dict[str, Any] = SETTINGS | {"run.steps": options.steps}
    if options.engine == "vllm":
        settings |= ENGINES
    settings |= {name: yaml.safe_load(value) for name, value in options.set}
    if options.keep is not None:
        options.keep.mkdir(parents=True)
        result = soak(options.keep.resolve(), settings, options)
    else:
        with tempfile.TemporaryDirectory(prefix="soak-") as root:
            result = soak(Path(root), settings, options)
    device = device_name(torch.device("cpu"))
    print(f"{device}, torch {torch.__version__}, {options.engine}; {options.steps} steps, seed {options.seed}")
    wrong = report(result)
    if options.out:
        head = {
            "device": device,
            "torch": torch.__version__,
            "config": options.config.stem,
            "steps": options.steps,
            "kill_every": options.kill_every,
            "seed": options.seed,
            "engine": options.engine,
        }
        save(head | {"settings": settings, "result": result}, f"soak-{options.engine}-cpu")
    return 1 if wrong else 0
