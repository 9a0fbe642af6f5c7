"""Checkpoints as folders on disk: written whole or not at all, verified by checksum, found and pruned.

A checkpoint is a folder `step-<number>` whose `state.json` lists the sha256 of every other file in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advgame.errors import InputError
from advgame.learn.part_files import PartError, disk_reason, sha256_of, sync

STATE_FILE = "state.json"

_NAME = re.compile(r"step-(\d{6,})")


class CheckpointError(InputError):
    """A checkpoint could not be written; the earlier ones are intact.

    An InputError, since its one line (disk full, no permission) is for the user to mend, not for a traceback.
    """


@dataclass(frozen=True)
class Found:
    """The newest usable checkpoint (None: there is none), and why newer ones were passed over."""

    path: Path | None
    skipped: tuple[str, ...] = ()


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def list_checkpoints(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every visible checkpoint, oldest first, unverified."""
    if not checkpoints.is_dir():
        return []
    found = [(int(m.group(1)), p) for p in checkpoints.iterdir() if (m := _NAME.fullmatch(p.name))]
    return sorted(found)


def latest_checkpoint(checkpoints: Path, warn: Callable[[str], None] | None = None) -> Found:
    """The newest checkpoint whose files all match their checksums.

    A damaged one is passed over in favour of the one before, told to `warn` (default: standard error) and
    counted in `skipped`. Reads every byte of what it verifies.
    """
    tell = warn or (lambda text: print(text, file=sys.stderr))
    skipped: list[str] = []
    for _, path in reversed(list_checkpoints(checkpoints)):
        problem = checkpoint_problem(path)
        if problem is None:
            return Found(path, tuple(skipped))
        skipped.append(f"{path.name}: {problem}")
        tell(f"warning: checkpoint {path} is damaged ({problem}); falling back to the one before")
    return Found(None, tuple(skipped))


def checkpoint_problem(path: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None when every file is there with its checksum."""
    try:
        checksums = read_state(path)["checksums"]
        for name in checksums:
            if not (path / name).is_file():
                return f"{name} is missing"
        for name, actual in _checksums(path, list(checksums)).items():
            if actual != checksums[name]:
                return f"{name} does not match its checksum"
    except InputError as error:
        return str(error)
    except (OSError, AttributeError, KeyError, TypeError) as error:
        return f"{STATE_FILE} or a file is unreadable ({error!r})"
    return None


def read_state(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint, its own checksum verified. Raises InputError if missing or damaged."""
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        own = state.pop("checksum")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path / STATE_FILE}: missing or unreadable ({error}); not a complete checkpoint") from error
    if own != _state_checksum(state):
        raise InputError(f"{path / STATE_FILE}: does not match its checksum; use an earlier checkpoint")
    assert isinstance(state, dict)
    return state


def hidden_folder(checkpoints: Path, step: int) -> Path:
    """Where this process writes the checkpoint of a step, until all of it is there."""
    return checkpoints / f".tmp-{checkpoint_name(step)}-{os.getpid()}"


@contextmanager
def half_written(checkpoints: Path, step: int) -> Iterator[Path]:
    """Inside, a checkpoint is being written into its hidden folder, or begun to be.

    On any error the folder is removed and nothing else has changed; an error of the disk, or of a rank that writes,
    becomes a one-line CheckpointError.
    """
    hidden = hidden_folder(checkpoints, step)
    try:
        yield hidden
    except BaseException as error:
        shutil.rmtree(hidden, ignore_errors=True)
        if (reason := str(error) if isinstance(error, PartError) else disk_reason(error)) is not None:
            raise CheckpointError(
                f"{checkpoints / checkpoint_name(step)}: could not be written ({reason}); earlier checkpoints are "
                "intact; free space or fix the folder, then resume"
            ) from error
        raise


def begin_hidden(hidden: Path) -> None:
    """An empty folder in the place of whatever a process of this number has left."""
    hidden.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir()


def publish_hidden(hidden: Path, state: Mapping[str, Any], known: Mapping[str, str]) -> Path:
    """Makes a written checkpoint visible under its name, whole; returns its folder.

    `state` goes into `state.json` with the checksum of every file (`known`: of those that need not be read again), all
    is flushed to the disk, and one rename publishes it.
    """
    final = hidden.parent / checkpoint_name(state["step"])
    _seal(hidden, dict(state), known)
    _publish(hidden, final)
    return final


def prune_checkpoints(checkpoints: Path, newest: int, keep: int) -> list[Path]:
    """Deletes all but the `keep` newest checkpoints up to step `newest`, and returns what was deleted.

    Checkpoints of later steps belong to a branch that was abandoned by resuming earlier; they go too, or a
    later `latest_checkpoint` would return to that branch. So do folders that a killed process left half
    written.
    """
    if keep < 1:
        raise InputError(f"checkpoints to keep: {keep}; must be at least 1")
    listed = list_checkpoints(checkpoints)
    current = [path for step, path in listed if step <= newest]
    doomed = [path for step, path in listed if step > newest] + current[:-keep]
    doomed += [path for path in checkpoints.iterdir() if path.name.startswith((".tmp-", ".old-"))]
    for path in doomed:
        hidden = path if path.name.startswith(".") else path.with_name(f".old-{path.name}-{os.getpid()}")
        if hidden != path:
            with suppress(OSError):  # under its name a checkpoint is whole or not there, whenever this is cut short
                path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
    return doomed


def _seal(folder: Path, state: dict[str, Any], known: Mapping[str, str]) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    found = _checksums(folder, [name for name in names if name not in known])
    state = state | {"checksums": {name: known[name] if name in known else found[name] for name in names}}
    state = json.loads(json.dumps(state))  # as it will be read: the checksum must not depend on tuples
    text = json.dumps(state | {"checksum": _state_checksum(state)}, indent=1)
    (folder / STATE_FILE).write_text(text + "\n", encoding="utf-8")
    for path in (*files, folder / STATE_FILE):
        sync(path)
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        sync(path)


def _publish(hidden: Path, final: Path) -> None:
    """One rename; an abandoned or damaged checkpoint of the same step is moved out of the way first.

    A crash between those two renames loses that older twin, never the checkpoints of other steps.
    """
    if final.exists():
        old = final.with_name(f".old-{final.name}-{os.getpid()}")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        try:
            hidden.rename(final)
        except OSError:
            old.rename(final)
            raise
    else:
        hidden.rename(final)
    sync(final.parent)


def _checksums(folder: Path, names: list[str]) -> dict[str, str]:
    """sha256 by file name. Threads, since hashing frees the interpreter and 7B players make 200 GB."""
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: sha256_of(folder / name), names), strict=True))


def _state_checksum(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
