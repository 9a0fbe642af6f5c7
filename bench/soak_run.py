"""One run that is started, killed at moments drawn by chance, and started again until it has ended: `Soak`.

The moments: while it starts, in the middle of a step, while a checkpoint is written, just after one; or one of its
children alone is killed. What its processes hold is watched, and what outlives a kill or the end is told by `leaks`.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench import traces
from bench.soak_checks import half_checkpoints

START, STEP, WRITE, AFTER, CHILD = (
    "while starting",
    "in a step",
    "writing a checkpoint",
    "after a checkpoint",
    "a child",
)
WEIGHTS = {START: 1, STEP: 3, WRITE: 3, AFTER: 2}
"""How often each is drawn; children are killed as often as all of these together, where a run has some that work."""
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
