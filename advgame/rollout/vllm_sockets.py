"""Where vLLM's sockets lie: a folder of this process, which goes when it ends, or when another starts after a kill.

vLLM puts some files for each engine into the temporary folder, and a killed process leaves them there for ever. So it
does with what the workers of a tensor-parallel engine share in /dev/shm, where nobody can give them a folder: its names
are found through the files in this one.
"""

from __future__ import annotations

import atexit
import fcntl
import glob
import os
import re
import shutil
import tempfile
import time
from contextlib import suppress
from functools import cache
from multiprocessing import resource_tracker
from pathlib import Path

PREFIX, LOCK = "advgame-vllm-", ".held"
SHARED = Path("/dev/shm")
MEETING = "vllm_dist_"
"""A file through which an engine's workers meet is called so and a number, and so is what they share on the CPU."""
NOTE = "shared-"
"""And a worker's process id: a list of the names of the queues that it reads and writes."""
QUEUE, SEMAPHORE = "psm_", "sem."
"""How names in /dev/shm begin: of the queues between an engine's processes, and of semaphores (joblib's, with a process
id)."""
LONGEST = 107 - 37
"""Bytes of a folder's path that leave room for vLLM's names: a socket's path has 107 at most."""
YOUNG_S = 1.0
"""A lock that nobody holds may be one that is being taken."""


@cache
def folder() -> Path | None:
    """This process's; None where its path would be too long for sockets. Deletes those of processes that are gone."""
    root = Path(tempfile.gettempdir())
    sweep(root)
    made = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
    if len(os.fsencode(made)) > LONGEST:
        made.rmdir()
        return None
    # held as long as this process, or a fork of it, lives
    fcntl.flock(os.open(made / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600), fcntl.LOCK_EX)
    atexit.register(_leave, made, os.getpid())
    return made


def _leave(made: Path, owner: int) -> None:
    if os.getpid() == owner:  # a fork's end is not ours
        _forget(_unshared(made, everybody=True))
        shutil.rmtree(made, ignore_errors=True)


def note_shared() -> None:
    """For a worker that runs: writes down its queues' names, for those who are there when it is gone."""
    made = Path(os.environ.get("TMPDIR", ""))
    if made.name.startswith(PREFIX) and (made / LOCK).is_file():
        names = set(re.findall(rf"{SHARED}/({QUEUE}\w+)$", Path("/proc/self/maps").read_text(), re.MULTILINE))
        (made / f"{NOTE}{os.getpid()}").write_text("\n".join(sorted(names)))


def tidy() -> None:
    """Deletes from /dev/shm what this process's engines no longer need there by name, or left when they were killed."""
    made = folder()
    if made is not None:
        _forget(_unshared(made, everybody=False))


def _unshared(made: Path, *, everybody: bool) -> list[str]:
    """The names that were deleted: those by which an engine's workers met, who have done so once it serves, and those
    of workers that are gone (`everybody`: of all)."""
    paths = [path for file in made.glob(f"{MEETING}*") for path in SHARED.glob(f"{glob.escape(file.name)}-*")]
    for note in made.glob(f"{NOTE}*"):
        worker = note.name.removeprefix(NOTE)
        if everybody or not Path(f"/proc/{worker}").exists():
            paths += [SHARED / name for name in note.read_text().split() if name.startswith(QUEUE)]
            paths += SHARED.glob(f"{SEMAPHORE}loky-{worker}-*")
            note.unlink()
    deleted = []
    for path in paths:
        with suppress(OSError):
            path.unlink()
            deleted.append(path.name)
    return deleted


def _forget(names: list[str]) -> None:
    """Python notes what its children share and would delete it, with a warning, when this process ends."""
    for name in names:
        if name.startswith(QUEUE):
            resource_tracker.unregister("/" + name, "shared_memory")
        elif name.startswith(SEMAPHORE):
            resource_tracker.unregister("/" + name.removeprefix(SEMAPHORE), "semaphore")


def sweep(root: Path) -> None:
    """Deletes folders of this user's that no live process holds, and what their engines shared."""
    for path in root.glob(f"{PREFIX}*"):
        with suppress(OSError):
            about = path.lstat()
            if about.st_uid != os.getuid() or not path.is_dir() or path.is_symlink():
                continue
            if not (path / LOCK).is_file():
                continue
            lock = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(lock).st_mtime > YOUNG_S:
                    _unshared(path, everybody=True)
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
