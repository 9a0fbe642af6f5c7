"""Where vLLM's sockets lie: a folder of this process, which goes when it ends, or when another starts after a kill.

vLLM puts some files for each engine into the temporary folder, and a killed process leaves them there for ever.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

PREFIX, LOCK = "advgame-vllm-", ".held"
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
        shutil.rmtree(made, ignore_errors=True)


def sweep(root: Path) -> None:
    """Deletes folders of this user's that no live process holds."""
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
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
