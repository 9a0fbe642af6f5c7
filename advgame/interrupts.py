"""Ctrl-C while a child process starts."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held() -> Iterator[None]:
    """Inside, a Ctrl-C waits, here and in the children that start now, until they say otherwise: one at the terminal
    reaches them too, and before they could have a word in it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
