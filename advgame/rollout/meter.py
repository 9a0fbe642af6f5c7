"""How long something is in use: wall seconds with at least one use, and seconds summed over all uses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Meter:
    """Counts uses that overlap; `clock` gives seconds. One thread only.

    busy: seconds with at least one use under way. summed: seconds of every use, added up. Both include what the uses
    that are still under way have taken so far.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._uses = 0
        self._last = 0.0
        self._busy = self._summed = 0.0

    @contextmanager
    def use(self) -> Iterator[None]:
        self._advance()
        self._uses += 1
        try:
            yield
        finally:
            self._advance()
            self._uses -= 1

    def take(self) -> tuple[float, float]:
        """(busy, summed) since the last call."""
        self._advance()
        taken = self._busy, self._summed
        self._busy = self._summed = 0.0
        return taken

    def _advance(self) -> None:
        now = self._clock()
        if self._uses:
            self._busy += now - self._last
            self._summed += self._uses * (now - self._last)
        self._last = now
