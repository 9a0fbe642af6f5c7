"""Threads for calls that may hang: nobody waits for one that was given up, but the process's end does, for a while."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable
from weakref import WeakSet

PATIENCE_S = 2.0
"""Longest wait at the process's end, for all of them together."""

_started: WeakSet[threading.Thread] = WeakSet()


def start_daemon(run: Callable[[], None], name: str) -> threading.Thread:
    """A daemon thread, for which the shutdown waits a little: one that comes back from C++ while the interpreter shuts
    down is unwound through code that cannot be, and the process aborts ("terminate called without an active
    exception")."""
    thread = threading.Thread(target=run, daemon=True, name=name)
    _started.add(thread)
    thread.start()
    return thread


@atexit.register
def _wait() -> None:
    until = time.monotonic() + PATIENCE_S
    for thread in list(_started):
        thread.join(max(0.0, until - time.monotonic()))
