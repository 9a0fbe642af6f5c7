"""How long the start of a vLLM engine may take: vLLM's own wait for its processes has no end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

from advgame.daemons import start_daemon
from advgame.rollout.engine import EngineDied

CORE = "EngineCore"
"""How vLLM's names of an engine's own process begin, in every version that `vllm_start` takes."""

LOOK_S = 0.1
"""Seconds between looks at whether a start has taken too long."""

_starting = threading.Lock()


class Overdue(EngineDied):
    """A start was given up: it took too long, or nobody wanted it any more."""


def overdue(seconds: float) -> Overdue:
    return Overdue(
        f"vLLM does not start within {seconds:g} s; raise rollout.vllm.start_timeout_s, or set VLLM_LOGGING_LEVEL=INFO "
        "in the environment to see what it waits for"
    )


class Limit:
    """Of one start, which blocks its thread in a wait of vLLM's that has no end of its own.

    When the time is over, or the start is called off, the processes that it made are killed, and vLLM raises. Before
    there is one (vLLM is still reading its settings) nothing can be cut short.
    """

    def __init__(self, seconds: float):
        self._seconds, self._until = seconds, time.monotonic() + seconds

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._until

    def call_off(self) -> None:
        """From any thread."""
        self._until = float("-inf")

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One start at a time, so that what is new meanwhile under vLLM's name is its own. Raises Overdue."""
        while not _starting.acquire(timeout=LOOK_S):
            if self.over:
                raise overdue(self._seconds)
        try:
            before, ended = set(cores()), threading.Event()

            def guard() -> None:
                while not ended.wait(LOOK_S):
                    if self.over:
                        kill_cores(set(cores()) - before)

            guarding = start_daemon(guard, "advgame-start")
            try:
                yield
            except Exception as error:
                if not self.over:
                    raise
                raise overdue(self._seconds) from error
            finally:
                ended.set()
                guarding.join()
        finally:
            _starting.release()


def cores() -> list[BaseProcess]:
    """Of all engines that this process has started or is starting; without their workers."""
    return [child for child in multiprocessing.active_children() if child.name.startswith(CORE)]


def kill_cores(these: Iterable[BaseProcess]) -> None:
    """With all that stem from them: a worker that has just begun does not yet end when its parent does."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it is gone
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    for core in these:
        below = list(children.get(core.pid or 0, ()))
        for pid in below:
            below += children.get(pid, ())
        core.kill()
        for pid in below:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
