"""The run folder: one place on disk that holds everything of a run, written by one process at a time."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import secrets
import weakref
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from advgame.errors import InputError
from advgame.run.environment import describe_environment

_NOTICE = """# Controlled artifacts

This folder records an adversarial training run. The weights of the **Attacker** (and of any model that
shares them) and the **attacks** recorded under `trees/` are controlled artifacts: they were optimised to make
a language model misbehave.

Stated purpose of this run: {purpose}

- Keep them within the group that the purpose names; do not publish or deploy the Attacker.
- Share aggregate numbers freely, single attacks only where the purpose needs them.
- Delete the Attacker's checkpoints and `trees/` when the purpose is served.
"""


class RunLock:
    """An advisory lock on a file, held until `release` or the process ends; its text names the holder."""

    def __init__(self, path: Path) -> None:
        """Takes the lock. Raises InputError naming the pid of another process (or RunLock) that has it."""
        self._fd: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._fd, 200, 0).decode(errors="replace").strip() or "an unknown process"
            self._close()
            if not isinstance(error, BlockingIOError):
                raise InputError(f"{path}: cannot be locked ({error.strerror}); use another file system") from error
            raise InputError(f"{path.parent}: {holder} is writing to this run; stop it or start another run") from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"pid {os.getpid()} on {platform.node()}\n".encode(), 0)
        # A forked engine that outlives a killed trainer must not keep the run locked.
        forget = weakref.WeakMethod(self._close)
        os.register_at_fork(after_in_child=lambda: (close := forget()) and close())

    def release(self) -> None:
        if self._fd is not None:
            os.ftruncate(self._fd, 0)
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        self._close()

    def _close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run. `attempt` is 0 for the first start and grows by one at each resume.

    `lock` is None for a folder opened to be read. Use as a context manager, or call `close`, to release the
    lock; the end of the process releases it too.
    """

    path: Path
    attempt: int
    lock: RunLock | None = None

    @classmethod
    def create(cls, root: Path, name: str | None, config_yaml: str, *, purpose: str) -> RunFolder:
        """A new, locked folder `root/name` (default: a timestamp and a short suffix).

        `config_yaml` is the resolved configuration; `purpose` goes into the notice on controlled artifacts.
        Raises InputError when `root` cannot be written, the name is no plain folder name, or it is taken.
        """
        if name is not None and (not name.strip() or name.startswith(".") or Path(name).name != name):
            raise InputError(f"run name {name!r}: must be a plain folder name, without '/' and leading '.'")
        path = _new_folder(root, name)
        folder = cls(path, 0, RunLock(path / ".lock"))
        for part in (folder.trees, folder.checkpoints, folder.tensorboard):
            part.mkdir()
        folder.config.write_text(config_yaml, encoding="utf-8")
        folder.notice.write_text(_NOTICE.format(purpose=purpose.strip() or "none stated"), encoding="utf-8")
        folder.metrics.touch()
        folder.log.touch()
        _write_starts(folder.environment, [describe_environment()])
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run, to be read: takes no lock and writes nothing. Raises InputError if it is none."""
        return cls(path, len(_read_starts(path)) - 1)

    @classmethod
    def resume(cls, path: Path) -> RunFolder:
        """An existing run, to be continued: locked, and recorded as one more attempt in `environment.json`.

        Raises InputError if it is not a run folder, or another process is writing to it.
        """
        _read_starts(path)
        try:
            lock = RunLock(path / ".lock")
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); resume a copy elsewhere") from error
        return cls(path, 0, lock).again()

    def again(self) -> RunFolder:
        """The same run in its next attempt, under the same lock."""
        starts = [*_read_starts(self.path), describe_environment()]
        _write_starts(self.environment, starts)
        return replace(self, attempt=len(starts) - 1)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        """The resolved settings, YAML."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """`{"starts": [...]}`, one description an attempt."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def trees(self) -> Path:
        return self.path / "trees"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def picture(self) -> Path:
        return self.path / "summary.png"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def notice(self) -> Path:
        return self.path / "CONTROLLED.md"

    def close(self) -> None:
        """Releases the lock."""
        if self.lock is not None:
            self.lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_text_atomically(path: Path, text: str) -> None:
    """Replaces the file `path` in one step: a reader, or a crash, sees the old text or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _new_folder(root: Path, name: str | None) -> Path:
    while True:
        path = root / (name or f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}")
        try:
            root.mkdir(parents=True, exist_ok=True)
            path.mkdir()
            return path
        except FileExistsError:
            if path.exists() and name is not None:
                raise InputError(f"{path}: exists already; choose another name, or resume it") from None
            if not path.exists():
                raise InputError(f"{root}: is not a folder; choose another root for runs") from None
        except OSError as error:
            raise InputError(f"{root}: cannot hold runs ({error.strerror}); choose another root for runs") from error


def _read_starts(path: Path) -> list[dict[str, Any]]:
    if not (path / "config.yaml").is_file():
        raise InputError(f"{path}: not a run folder (no config.yaml); name a folder that `advgame train` made")
    try:
        starts = json.loads((path / "environment.json").read_text(encoding="utf-8"))["starts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}/environment.json: missing or damaged ({error}); not a complete run folder") from error
    if not isinstance(starts, list) or not starts:
        raise InputError(f"{path}/environment.json: field 'starts' must be a list with one entry a start")
    return starts


def _write_starts(path: Path, starts: list[dict[str, Any]]) -> None:
    write_text_atomically(path, json.dumps({"starts": starts}, indent=2) + "\n")
