"""What is known of ranks that may die: calls to them end, and the run's own work is cancelled, once one has."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from advgame.daemons import start_daemon
from advgame.errors import RanksDied

T = TypeVar("T")

TOLD_S = 10.0
"""Longest wait for the news of a death whose connections have closed already."""


class Watch:
    """Between whoever watches the ranks (`died`) and whoever calls them."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._death: Exception | None = None
        self._listeners: list[Callable[[], None]] = []

    def died(self, error: Exception) -> None:
        """A rank is gone, `error` says how (RanksDied, or the user's InputError); the first report counts."""
        with self._news:
            if self._death is None:
                self._death = error
                for listener in self._listeners:
                    listener()
            self._news.notify_all()

    def check(self, seconds: float = 0.0) -> None:
        """Raises what `died` was told, if it is within `seconds`."""
        with self._news:
            self._news.wait_for(lambda: self._death is not None, seconds)
            if self._death is not None:
                raise type(self._death)(*self._death.args)  # several threads may ask

    def unless_died(self, call: Callable[[], T]) -> T:
        """`call()`, which talks to the ranks and may never return once one of them has died: then what `died` was told.

        The call runs in a thread of its own, which is left behind in that case.
        """
        ended: list[tuple[Any, BaseException | None]] = []

        def run() -> None:
            try:
                outcome: tuple[Any, BaseException | None] = (call(), None)
            except BaseException as error:
                outcome = (None, error)
            with self._news:
                ended.append(outcome)
                self._news.notify_all()

        self.check()
        start_daemon(run, "advgame-ranks")
        with self._news:
            self._news.wait_for(lambda: ended or self._death is not None)
        if not ended:
            self.check()
        result, error = ended[0]
        if error is not None:
            self.check(TOLD_S)
            raise RanksDied(f"a trainer rank does not answer ({' '.join(str(error).split())[:160]})") from error
        value: T = result
        return value

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """`work`'s result; once a rank has died it is cancelled, and what `died` was told is raised."""
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)

        def cancel() -> None:
            with suppress(RuntimeError):  # the loop has ended by itself
                loop.call_soon_threadsafe(task.cancel)

        with self._news:
            self._listeners.append(cancel)
            if self._death is not None:
                cancel()
        try:
            return await task
        except (Exception, asyncio.CancelledError):
            self.check()  # whatever has come of it
            raise
        finally:
            with self._news:
                self._listeners.remove(cancel)
