"""Makes the world's models once and keeps them: child processes train, finished folders are cached.

A model's folder is `<cache>/world-<hash>/<role>`; the hash covers the settings that the role depends on, the
source files that make it, and `FORMAT`. A folder appears by a rename, so it is either absent or complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from advgame.errors import InputError
from advgame.world import grammar, judge, judge_recipes, judge_training, lexicon, recipes, tokenizer, training
from advgame.world.settings import WorldSettings
from advgame.world.training import PlayerRole

FORMAT = 2
"""Raised when players must be made anew although neither settings nor those sources changed."""

MAKING = ".making-"
"""How the names of folders begin that hold unfinished players."""

Progress = Callable[[str, int, int, float], None]
"""Called as (role, step, steps, loss) in the calling thread."""


def default_cache() -> Path:
    """$ADVGAME_CACHE, else ~/.cache/advgame."""
    return Path(os.environ.get("ADVGAME_CACHE") or Path.home() / ".cache" / "advgame")


def steps_of(settings: WorldSettings, role: PlayerRole) -> int:
    """Supervised steps that make the model of `role`."""
    return settings.judge_steps if role is PlayerRole.JUDGE else settings.warm_steps


def player_folder(settings: WorldSettings, role: PlayerRole, cache: Path) -> Path:
    """Where the player of these settings is kept, whether it exists yet or not."""
    everything = settings.model_dump(mode="json")
    judges = {name: value for name, value in everything.items() if name.startswith("judge_")}
    modules = [grammar, lexicon, recipes, tokenizer, training]
    texts = []
    if role is PlayerRole.JUDGE:
        chosen = {"seed": settings.seed, **judges}
        modules += [judge, judge_recipes, judge_training]
        texts = [path.read_text(encoding="utf-8") for path in sorted(judge_training.JUDGE_TEMPLATES.glob("*.md"))]
    else:
        chosen = {name: value for name, value in everything.items() if name not in judges}
    if role is PlayerRole.DEFENDER:
        # these shape the Attacker's examples only: both levels share their Defender
        del chosen["level"], chosen["reasoning"]
    texts = [inspect.getsource(module) for module in modules] + texts
    key = json.dumps([FORMAT, chosen, texts], sort_keys=True)
    return cache / f"world-{hashlib.sha256(key.encode()).hexdigest()[:16]}" / role


def ensure_players(
    settings: WorldSettings, roles: Sequence[PlayerRole], cache: Path, progress: Progress | None = None
) -> dict[PlayerRole, Path]:
    """The folders of `roles`; where the cache lacks them they are made, by one process each, in parallel.

    Raises:
        RuntimeError: a child failed; the message ends with its last words.
    """
    folders = {role: player_folder(settings, role, cache) for role in roles}
    missing = [role for role in roles if not (folders[role] / "config.json").is_file()]
    if missing:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            (cache / ".lock").touch()
        except OSError as error:
            raise InputError(
                f"{cache}: cannot hold players ({error.strerror}); set ADVGAME_CACHE to a folder"
            ) from error
        with _one_at_a_time(cache) as alone:
            for left in cache.glob(f"{MAKING}*") if alone else ():
                shutil.rmtree(left, ignore_errors=True)  # of a process that was killed
            with tempfile.TemporaryDirectory(prefix=MAKING, dir=cache) as work:
                # another process may have made them while this one waited
                missing = [role for role in missing if not (folders[role] / "config.json").is_file()]
                _train_all(settings, missing, Path(work), progress)
                for role in missing:
                    _move_in(Path(work) / role, folders[role])
    return folders


@contextmanager
def _one_at_a_time(cache: Path) -> Iterator[bool]:
    """Processes that need players at the same moment make them once, not each. Gives whether nobody else makes any."""
    with (cache / ".lock").open("w") as file:
        alone = False
        with suppress(OSError):  # a file system without locks: they are made twice, and the first one stays
            fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        yield alone


def _move_in(made: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(made, folder)
    except OSError:
        # another process was faster; its player is the same
        if not (folder / "config.json").is_file():
            raise
        shutil.rmtree(made)


def _train_all(settings: WorldSettings, roles: Sequence[PlayerRole], work: Path, progress: Progress | None) -> None:
    lines: queue.Queue[tuple[PlayerRole, str | None]] = queue.Queue()
    children = {role: _start(settings, role, work) for role in roles}
    try:
        for role, child in children.items():
            threading.Thread(target=_read_lines, args=(role, child, lines), daemon=True).start()
        running = set(roles)
        while running:
            role, line = lines.get()
            if line is None:
                running.discard(role)
                if children[role].wait() != 0:
                    said = (work / f"{role}.log").read_text(encoding="utf-8", errors="replace").strip()
                    raise RuntimeError(f"the warm start of the {role} failed: {said[-2000:] or 'no message'}")
            elif progress is not None:
                words = line.split()  # libraries print as well
                if len(words) == 3 and words[0] == training.PROGRESS:
                    progress(role, int(words[1]), steps_of(settings, role), float(words[2]))
    finally:
        for child in children.values():
            if child.poll() is None:
                child.kill()
            child.wait()


def _start(settings: WorldSettings, role: PlayerRole, work: Path) -> subprocess.Popen[str]:
    """A fresh interpreter, not a fork (torch's threads do not survive one) and not multiprocessing's spawn
    (which would run the caller's main module again)."""
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        # glibc: keep freed memory instead of faulting it in again for every tensor; a quarter of the time
        "MALLOC_TOP_PAD_": str(1 << 28),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    }
    maker = judge_training if role is PlayerRole.JUDGE else training
    with (work / f"{role}.log").open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "-m", maker.__name__, role, settings.model_dump_json(), str(work / role)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )


def _read_lines(
    role: PlayerRole, child: subprocess.Popen[str], lines: queue.Queue[tuple[PlayerRole, str | None]]
) -> None:
    assert child.stdout is not None, "opened as a pipe"
    for line in child.stdout:
        lines.put((role, line))
    lines.put((role, None))
