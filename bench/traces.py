"""What the processes of a run hold, and what they leave behind: processes, listening ports, shared memory (Linux).

A run is started with a word in its environment and in a session of its own. What it starts inherits both; a process
that hides one (by rewriting its title, or with `setsid`) still has the other.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

PROC, SHARED = Path("/proc"), Path("/dev/shm")
VARIABLE = "ADVGAME_TRACE"
LISTENING = "0A"


@dataclass(frozen=True)
class Process:
    """A live process; with its start (clock ticks since boot) its number is unique."""

    pid: int
    started: int
    command: str


def run_processes(word: str, session: int) -> list[Process]:
    """Live processes (zombies are none) that carry `word` in $ADVGAME_TRACE or belong to `session`."""
    needle = f"{VARIABLE}={word}".encode()
    found = []
    for pid in _pids():
        with suppress(OSError, ValueError):
            state, _, _, own_session, *rest = _stat(pid)
            if state != "Z" and (int(own_session) == session or needle in _read(pid, "environ").split(b"\0")):
                found.append(Process(pid, int(rest[15]), _command(pid)))
    return found


def alive(process: Process) -> bool:
    """Whether it still runs, and is not another one of the same number."""
    with suppress(OSError, ValueError):
        state, *rest = _stat(process.pid)
        return state != "Z" and int(rest[18]) == process.started
    return False


def wait_for(gone: Callable[[], Collection[object]], seconds: float) -> float:
    """Waits until `gone()` is empty, at most `seconds`; returns how long that took."""
    start = time.monotonic()
    while gone() and time.monotonic() - start < seconds:
        time.sleep(0.02)
    return time.monotonic() - start


def end(processes: Collection[Process]) -> None:
    """Kills what still runs of these."""
    for process in processes:
        if alive(process):
            with suppress(OSError):
                os.kill(process.pid, signal.SIGKILL)


def listeners(pids: Collection[int]) -> set[tuple[str, int]]:
    """(address, port) of every TCP socket on which one of these processes listens."""
    inodes = {inode for pid in pids for inode in _sockets(pid)}
    return {(address, port) for address, port, inode in _listening() if inode in inodes}


def still_listening(ports: Collection[tuple[str, int]]) -> set[tuple[str, int]]:
    """Those of `ports` on which somebody listens now."""
    return {(address, port) for address, port, _ in _listening()} & set(ports)


def held(pids: Collection[int]) -> set[str]:
    """Names in /dev/shm that one of these processes maps or holds open, those deleted already left out."""
    names = set()
    for pid in pids:
        with suppress(OSError):
            names |= {line.partition(b"/dev/shm/")[2].decode() for line in _read(pid, "maps").splitlines()
                      if b"/dev/shm/" in line}  # fmt: skip
        with suppress(OSError):
            targets = [_link(entry) for entry in (PROC / str(pid) / "fd").iterdir()]
            names |= {target.removeprefix("/dev/shm/") for target in targets if target.startswith("/dev/shm/")}
    return {name for name in names if not name.endswith(" (deleted)")}


def nobodys(names: Collection[str]) -> set[str]:
    """Those of `names` that are in /dev/shm and that no live process holds any more."""
    left = set(names) & set(os.listdir(SHARED)) if SHARED.is_dir() else set()
    return left - held(_pids()) if left else left


def _pids() -> list[int]:
    return [int(name) for name in os.listdir(PROC) if name.isdigit()]


def _read(pid: int, name: str) -> bytes:
    return (PROC / str(pid) / name).read_bytes()


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; the name before it may hold anything."""
    return _read(pid, "stat").decode(errors="replace").rpartition(")")[2].split()


def _command(pid: int) -> str:
    return _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()[:200]


def _sockets(pid: int) -> Iterator[str]:
    with suppress(OSError):
        for entry in (PROC / str(pid) / "fd").iterdir():
            if (target := _link(entry)).startswith("socket:["):
                yield target[8:-1]


def _link(entry: Path) -> str:
    try:
        return os.readlink(entry)
    except OSError:
        return ""


def _listening() -> Iterator[tuple[str, int, str]]:
    """(address, port, inode) of every listening TCP socket of this network name space."""
    for name in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in (PROC / "net" / name).read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == LISTENING:
                    address, _, port = words[1].partition(":")
                    yield _address(address), int(port, 16), words[9]


def _address(text: str) -> str:
    """The kernel writes an address as 32-bit words of the machine's byte order; little-endian, as on x86 and Arm."""
    raw = b"".join(bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8))
    return str(IPv4Address(raw) if len(raw) == 4 else IPv6Address(raw))
