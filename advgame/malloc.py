"""Memory of a run's process: what glibc keeps of it, and how often Python looks for garbage in it."""

from __future__ import annotations

import ctypes
import gc

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8  # malloc.h
_KEEP = 1 << 30
_PAD = 1 << 26


def keep_freed_memory() -> bool:
    """Sets the thresholds of this process's allocator; False where there is no glibc (nothing is changed then).

    A CPU run otherwise faults the same pages in for every large tensor.

    All threads share one arena: the others grow and shrink by small heaps whatever the thresholds, and learning beside
    play, in a thread of its own, would fault all of its memory in again at every step.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all(
        mallopt(option, value) == 1
        for option, value in (
            (_TRIM_THRESHOLD, _KEEP),
            (_TOP_PAD, _PAD),
            (_MMAP_THRESHOLD, _KEEP),
            (_ARENA_MAX, 1),
        )
    )


def collect_rarely() -> None:
    """Lets Python's cycle collector run at every 50 000th container that stays, not at every 700th or 2000th.

    Thousands of trees in flight are hundreds of thousands of live containers, in which it finds nothing and which it
    walks again and again: `python -m bench driver`.
    """
    gc.set_threshold(50_000, 20, 100)
