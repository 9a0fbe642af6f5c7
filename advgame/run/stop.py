"""Stopping on request: the first Ctrl-C (or SIGTERM) asks, the second one ends at once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Stop:
    """Whether somebody has asked for a stop. Made inside a running event loop, in the main thread."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._event = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self._ask)

    @property
    def asked(self) -> bool:
        return self._event.is_set()

    async def unless_asked(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of `work`; None, with `work` cancelled, if a stop is asked for before it ends."""
        if self.asked:
            work.close()
            return None
        task, stop = asyncio.create_task(work), asyncio.create_task(self._event.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
        return None if task.cancelled() else task.result()

    def _ask(self) -> None:
        if self.asked:
            return
        self._event.set()
        self._note("stopping after this step (an evaluation is left at once), then saving; Ctrl-C again: stop at once")
        # torchrun passes a Ctrl-C on that the terminal has sent already: that is one wish, not two
        if "TORCHELASTIC_RUN_ID" in os.environ:
            self._loop.call_later(1.0, self._end_at_once)
        else:
            self._end_at_once()

    def _end_at_once(self) -> None:
        """From now on the next signal ends the process."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.remove_signal_handler(number)
