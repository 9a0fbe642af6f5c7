"""One engine on a Ray cluster: the actor that holds vLLM, and its stand-in on the trainer's side."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError, TaskCancelledError

from advgame.rollout.engine import EngineDied, EngineError, Request
from advgame.rollout.vllm_process import LocalProcess, Order, launch
from advgame.rollout.vllm_requests import Answer

AT_ONCE = 1 << 14
"""Most calls of one actor under way; Ray's own default of 1000 is less than a step's requests."""

BEAT_S = 0.5
"""Seconds between looks at an engine."""

END_S = 8.0
"""Longest wait for an engine that ends in its own time."""


class EngineActor:
    """Lives on the engine's node. The engine core is its child, and dies with it."""

    def __init__(self) -> None:
        self._process: LocalProcess | None = None
        self._first: dict[str, asyncio.Event] = {}

    async def open(self, order: Order) -> tuple[int, int, list[int]]:
        """Starts vLLM; returns (vocabulary, positions, process ids: this one first)."""
        self._process = await launch(order)
        return self._process.vocabulary, self._process.positions, [os.getpid(), *self._process.process_ids]

    async def answer(self, request: Request, number: str, probed: bool) -> Answer:
        """`probed`: `first(number)` is waiting for its first token."""
        assert self._process is not None, "open comes first"
        if not probed:
            return await self._process.answer(request, number, None)
        event = self._first.setdefault(number, asyncio.Event())
        try:
            return await self._process.answer(request, number, event.set)
        finally:
            event.set()
            del self._first[number]

    async def first(self, number: str) -> None:
        """Returns at the first token of a request that is asked right after this call."""
        await self._first.setdefault(number, asyncio.Event()).wait()

    async def call(self, method: str, *arguments: Any) -> Any:
        """A coroutine method of `Process`."""
        return await getattr(self._process, method)(*arguments)

    async def alive(self) -> bool:
        return self._process is not None and self._process.alive()

    async def end(self) -> None:
        if self._process is not None:
            self._process.end()


class RayProcess:
    """`Process` whose calls go to an actor. Its death, its node's or its silence is known within seconds."""

    def __init__(self, actor: Any, opened: tuple[int, int, list[int]], silence_s: float):
        self.vocabulary, self.positions, self.process_ids = opened
        self._actor, self._silence = actor, silence_s
        self._over = False
        self._beat = asyncio.create_task(self._watch())

    def alive(self) -> bool:
        return not self._over

    async def answer(self, request: Request, number: str, sampled: Callable[[], None] | None) -> Answer:
        if sampled is None:
            return await self._done(self._actor.answer.remote(request, number, False))
        first = asyncio.ensure_future(self._done(self._actor.first.remote(number)))
        first.add_done_callback(lambda task: None if task.cancelled() or task.exception() else sampled())
        try:
            return await self._done(self._actor.answer.remote(request, number, True))
        finally:
            first.cancel()

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        answers: list[Any] = await self._call("collective_rpc", method, args)
        return answers

    async def pause(self, mode: str) -> None:
        await self._call("pause", mode)

    async def reset_caches(self) -> None:
        await self._call("reset_caches")

    async def stamp(self, version: int) -> None:
        await self._call("stamp", version)

    async def resume(self) -> None:
        await self._call("resume")

    def kill(self) -> None:
        if not self._over:
            self._over = True
            self._beat.cancel()
            kill(self._actor)

    def end(self) -> None:
        if not self._over:
            with suppress(RayError):
                ray.get(self._actor.end.remote(), timeout=END_S)
            self.kill()

    async def _call(self, method: str, *arguments: Any) -> Any:
        return await self._done(self._actor.call.remote(method, *arguments))

    async def _done(self, reference: Any) -> Any:
        """What a call returns; EngineDied when the actor is gone; an engine's own error as it was raised there."""
        try:
            return await reference
        except asyncio.CancelledError:
            with suppress(RayError, ValueError):
                ray.cancel(reference)
            raise
        except RayTaskError as error:
            if isinstance(error.cause, EngineError):
                raise error.cause from None
            raise RuntimeError(" ".join(str(error.cause or error).split())) from None
        except TaskCancelledError:
            raise EngineError("the call was cancelled on the engine's node") from None
        except RayError as error:
            # also where Ray would wait for it to come back: nobody knows what it still does
            self.kill()
            raise EngineDied(f"its actor is gone ({type(error).__name__})") from None

    async def _watch(self) -> None:
        """Ends this process when the actor says so, or says nothing for too long."""
        while not self._over:
            alive = await self._answers(self._actor.alive.remote())
            if not alive:
                self.kill()
                return
            await asyncio.sleep(BEAT_S)

    async def _answers(self, reference: Awaitable[bool]) -> bool:
        task = asyncio.ensure_future(_awaited(reference))
        task.add_done_callback(lambda one: one.cancelled() or one.exception())  # where nobody waits for it any more
        while True:
            since = time.monotonic()
            await asyncio.wait({task}, timeout=self._silence)
            if task.done():
                return not task.exception() and task.result()
            # this loop itself may have been held up by learning: then nobody was silent, the answer was not heard
            if time.monotonic() - since < self._silence + BEAT_S:
                task.cancel()
                return False


async def launch_actor(order: Order, *, options: Mapping[str, Any], silence_s: float) -> RayProcess:
    """A fresh actor, placed by `options`, with vLLM running in it."""
    actor = ray.remote(EngineActor).options(max_concurrency=AT_ONCE, **options).remote()
    try:
        opened = await actor.open.remote(order)
        return RayProcess(actor, opened, silence_s)
    except RayTaskError as error:
        kill(actor)
        raise RuntimeError(" ".join(str(error.cause or error).split())) from None
    except BaseException:
        kill(actor)
        raise


def kill(actor: Any) -> None:
    with suppress(RayError, ValueError):
        ray.kill(actor)


async def _awaited(reference: Awaitable[bool]) -> bool:
    return await reference
