"""One running vLLM, as the engine uses it: in this thread, in a thread of its own, or on another machine (cluster/)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from advgame.rollout import vllm_requests, vllm_start
from advgame.rollout.engine import EngineDied, EngineError, Request
from advgame.rollout.settings import VllmSettings
from advgame.rollout.vllm_limit import Limit, overdue
from advgame.rollout.vllm_requests import Answer

T = TypeVar("T")

END_S = 10.0
"""Longest wait for a thread whose engine ends in its own time."""


@dataclass(frozen=True)
class Order:
    """What is to be started; plain data, so that it can be sent. environment: what the channel wants found there."""

    folder: Path
    settings: VllmSettings
    dtype: str
    stop_ids: tuple[int, ...]
    direct: bool = False
    tokenizer: bool = False
    device: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


class Process(Protocol):
    """A running engine. `vocabulary` and `positions` bound a request's ids and its length."""

    vocabulary: int
    positions: int

    @property
    def process_ids(self) -> list[int]:
        """Of the engine's own processes."""

    def alive(self) -> bool:
        """What is known now, without asking anybody."""

    async def answer(self, request: Request, number: str, sampled: Callable[[], None] | None) -> Answer:
        """One completion; `sampled` is called at its first token. EngineError: refused; EngineDied: it is gone."""

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        """A method of `publish.worker.PublishWorker` in every worker; their results by rank."""

    async def pause(self, mode: str) -> None: ...

    async def reset_caches(self) -> None: ...

    async def stamp(self, version: int) -> None: ...

    async def resume(self) -> None: ...

    def kill(self) -> None:
        """Ends it at once, whatever it is doing; may be called again."""

    def end(self) -> None:
        """Lets it end in its own time (seconds), then makes sure."""


Launch = Callable[[Order], Awaitable[Process]]


class LocalProcess:
    """AsyncLLM on this event loop; its engine core is a child of this process."""

    def __init__(self, llm: Any, stop_ids: tuple[int, ...]):
        self.vocabulary: int = llm.model_config.get_vocab_size()
        self.positions: int = llm.model_config.max_model_len
        self.llm, self._stop_ids = llm, stop_ids

    @property
    def process_ids(self) -> list[int]:
        return vllm_start.process_ids(self.llm)

    def alive(self) -> bool:
        return vllm_start.alive(self.llm)

    async def answer(self, request: Request, number: str, sampled: Callable[[], None] | None) -> Answer:
        # one request tells of each of its tokens: the first one after a publish
        how = vllm_requests.parameters(request, self._stop_ids, every_token=sampled is not None)
        try:
            async for output in self.llm.generate({"prompt_token_ids": list(request.prompt_ids)}, how, number):
                if sampled is not None:
                    sampled()
                final = output
        except Exception as error:
            if vllm_requests.is_death(error):
                raise EngineDied("the engine's process ended") from None
            if vllm_requests.is_refusal(error):
                raise EngineError(str(error)) from None
            raise
        return vllm_requests.answer_of(final)

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        answers: list[Any] = await self.llm.collective_rpc(method, args=args)
        return answers

    async def pause(self, mode: str) -> None:
        await vllm_start.pause(self.llm, mode)

    async def reset_caches(self) -> None:
        await vllm_start.reset_caches(self.llm)

    async def stamp(self, version: int) -> None:
        await vllm_start.stamp(self.llm, version)

    async def resume(self) -> None:
        await vllm_start.resume(self.llm)

    def kill(self) -> None:
        vllm_start.kill(self.llm)

    def end(self) -> None:
        vllm_start.end(self.llm)


async def launch(order: Order, limit: Limit | None = None) -> LocalProcess:
    """On this event loop, which the start holds up for seconds to minutes. Raises Overdue after `start_timeout_s`."""
    arguments = vllm_start.engine_arguments(
        order.folder, order.settings, dtype=order.dtype, direct=order.direct, tokenizer=order.tokenizer
    )
    limit = limit or Limit(order.settings.start_timeout_s)
    with limit.turn():
        llm = vllm_start.start(arguments, order.settings, order.device, order.environment)
    if limit.over:  # its process may have been killed just now
        vllm_start.kill(llm)
        raise overdue(order.settings.start_timeout_s)
    return LocalProcess(llm, order.stop_ids)


class ThreadedProcess:
    """A LocalProcess with a thread and an event loop of its own: its start and its end hold up nobody else.

    The engine core dies with the thread that started it (`PublishWorker.advgame_guard`), so the thread lives as long.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._process: LocalProcess | None = None
        self._limit: Limit | None = None
        self._over = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="advgame-engine")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    async def open(self, order: Order) -> None:
        """Starts the engine. Whoever is cancelled meanwhile leaves none behind."""
        self._limit = Limit(order.settings.start_timeout_s)
        await self._there(self._open(order, self._limit))

    async def _open(self, order: Order, limit: Limit) -> None:
        try:
            process = await launch(order, limit)
        except Exception:
            if self._over:  # nobody waits for it any more
                raise asyncio.CancelledError from None
            raise
        if self._over:
            process.kill()
        self._process, self.vocabulary, self.positions = process, process.vocabulary, process.positions

    @property
    def process_ids(self) -> list[int]:
        return [] if self._process is None else self._process.process_ids

    def alive(self) -> bool:
        return not self._over and self._process is not None and self._process.alive()

    async def answer(self, request: Request, number: str, sampled: Callable[[], None] | None) -> Answer:
        return await self._there(self._own.answer(request, number, sampled))

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        return await self._there(self._own.collective_rpc(method, args))

    async def pause(self, mode: str) -> None:
        await self._there(self._own.pause(mode))

    async def reset_caches(self) -> None:
        await self._there(self._own.reset_caches())

    async def stamp(self, version: int) -> None:
        await self._there(self._own.stamp(version))

    async def resume(self) -> None:
        await self._there(self._own.resume())

    def kill(self) -> None:
        self._finish(LocalProcess.kill)

    def end(self) -> None:
        self._finish(LocalProcess.end)
        self.join(END_S)

    def join(self, seconds: float) -> None:
        """Waits for the thread of an engine that was killed or ended."""
        self._thread.join(seconds)

    def _finish(self, how: Callable[[LocalProcess], None]) -> None:
        if self._over:
            return
        self._over = True
        if self._process is not None and how is LocalProcess.kill:
            vllm_start.kill_processes(self._process.llm)  # now; the rest when the thread has time
        if self._limit is not None:
            self._limit.call_off()  # a start under way

        def finish() -> None:
            try:
                if self._process is not None:
                    how(self._process)
            finally:  # whatever vLLM says, the thread ends
                for task in asyncio.all_tasks(self._loop):
                    task.cancel()
                self._loop.call_later(0.1, self._loop.stop)  # what was cancelled gets its turn first

        self._loop.call_soon_threadsafe(finish)

    @property
    def _own(self) -> LocalProcess:
        assert self._process is not None, "open comes first"
        return self._process

    async def _there(self, work: Coroutine[Any, Any, T]) -> T:
        """`work` on the engine's own loop; a cancellation here reaches it. EngineDied: it was ended meanwhile."""
        if self._over:
            work.close()
            raise EngineDied("the engine was ended")
        try:
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._over and not (task is not None and task.cancelling()):
                raise EngineDied("the engine was ended") from None
            raise


async def launch_threaded(order: Order) -> ThreadedProcess:
    made = ThreadedProcess()
    try:
        await made.open(order)
    except BaseException:
        made.kill()
        # a start under way was called off, and ends in seconds: nothing of it is left behind
        await asyncio.to_thread(made.join, END_S)
        raise
    return made
