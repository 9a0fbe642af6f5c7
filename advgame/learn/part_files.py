"""Files of a player in a checkpoint that several ranks write: who writes which parameters, and how it is known.

A parameter lies whole in one file: who reads may be cut otherwise, or not at all. A rank that is done leaves a note of
its files; whoever seals the checkpoint looks for the notes, and reads nothing of the tensors again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

SILENT_S = 600.0
"""So long a rank may write nothing at all before it is given up: as long as a file system hangs."""

_POLL_S = 0.05
_LAYER = re.compile(r"(.*?\.\d+)\.")
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}


class PartError(Exception):
    """A rank could not write or read its part of a checkpoint: one line says which rank, and why."""


@dataclass(frozen=True)
class Written:
    """A file on the disk. size: of all of it; tensors: bytes of each."""

    sha256: str
    size: int
    tensors: Mapping[str, int]


def divide(shapes: Mapping[str, Sequence[int]], writers: int) -> list[list[str]]:
    """Parameters by writer, near equal in elements, none torn, in their order; a writer may have none.

    A layer's stay together: transformers may store several of them as one tensor. Of ranks that hold runs of equal
    length of all elements, as at ZeRO 1 and 2, each gets what mostly lies there already.
    """
    layers: dict[str, list[str]] = {}
    for name in shapes:
        found = _LAYER.match(name)
        layers.setdefault(found[1] if found else name, []).append(name)
    total = sum(prod(shape) for shape in shapes.values())
    divided: list[list[str]] = [[] for _ in range(writers)]
    before = 0
    for names in layers.values():
        size = sum(prod(shapes[name]) for name in names)
        divided[min(writers - 1, (2 * before + size) * writers // max(1, 2 * total))] += names
        before += size
    return divided


def numbered(stem: str, number: int, of: int, suffix: str = ".safetensors") -> str:
    """The name of a file, `number` of `of` from 0 on, as transformers numbers them."""
    return f"{stem}{suffix}" if of == 1 else f"{stem}-{number + 1:05d}-of-{of:05d}{suffix}"


def note_name(player: str, number: int, of: int) -> str:
    """Of the note that one writer leaves."""
    return numbered(f"part-{player}", number, of, ".json")


def write_part(folder: Path, note: str, files: Mapping[str, Callable[[], Mapping[str, Tensor]]], who: str) -> None:
    """Writes `files`, by their names in `folder`, and then the note.

    What fails stands in the note under the name `who`; then nothing else is left. files: what gives the tensors of
    each, contiguous and in host memory.
    """
    told: dict[str, object]
    try:
        told = {"files": {name: asdict(_written(folder / name, tensors())) for name, tensors in files.items()}}
    except Exception as error:
        for name in files:
            with suppress(OSError):  # room for the note
                (folder / name).unlink()
        told = {"error": f"{who}: {disk_reason(error) or _line(error)}"}
    made = folder / f".{note}"
    made.write_text(json.dumps(told), encoding="utf-8")
    sync(made)
    made.rename(folder / note)


def await_parts(folder: Path, notes: Mapping[str, int], alive: Callable[[], None]) -> dict[str, Written]:
    """All files that ranks have written into `folder`, by name, once every one has left its note; removes the notes.

    notes: rank by name. alive: raises when a rank has died. Raises PartError when a rank could not write.
    """
    size, since = -1, time.monotonic()
    while missing := [name for name in notes if not (folder / name).is_file()]:
        alive()
        if (now := _size(folder)) != size:
            size, since = now, time.monotonic()
        elif time.monotonic() - since > SILENT_S:
            raise PartError(f"trainer rank {notes[missing[0]]} has written nothing for {SILENT_S:g} s")
        time.sleep(_POLL_S)
    told = [json.loads((folder / name).read_text(encoding="utf-8")) for name in notes]
    if errors := [note["error"] for note in told if "error" in note]:
        raise PartError(errors[0])
    files = {name: Written(**written) for note in told for name, written in note["files"].items()}
    for name, written in files.items():
        if (found := (folder / name).stat().st_size) != written.size:
            raise PartError(f"{name} has {found} bytes, its rank wrote {written.size}")
    for name in notes:
        (folder / name).unlink()
    return files


def index(files: Mapping[str, Written], parameters: int) -> dict[str, object]:
    """What transformers wants beside numbered files of one model. files: by their names in its folder."""
    total = sum(size for written in files.values() for size in written.tensors.values())
    weights = {name: file for file, written in files.items() for name in written.tensors}
    about = {"total_parameters": parameters, "total_size": total}
    return {"metadata": about, "weight_map": dict(sorted(weights.items()))}


def disk_reason(error: BaseException) -> str | None:
    """Why the disk refused, or None when the error is not the disk's.

    safetensors and tokenizers write from Rust and raise their own types, with the system's text inside.
    """
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return os.strerror(error.errno)
    text = str(error)
    return next((reason for reason in map(os.strerror, _DISK_ERRORS) if reason in text), None)


def own_storage(tensor: Tensor) -> Tensor:
    """`tensor`, copied only if it is a view: safetensors refuses those, and copies are dear at 7B."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def sync(path: Path) -> None:
    """Flushes a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _written(path: Path, tensors: Mapping[str, Tensor]) -> Written:
    path.parent.mkdir(exist_ok=True)
    save_file(dict(tensors), path, metadata={"format": "pt"})
    sync(path)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    return Written(sha256_of(path), path.stat().st_size, sizes)


def _size(folder: Path) -> int:
    """Bytes of all files; one may vanish meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size
    return total


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
