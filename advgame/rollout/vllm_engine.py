"""The vLLM engine: continuous batching behind the engine protocol, weights through a channel, restarts when it dies."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from advgame.game.tree import Sample
from advgame.rollout import vllm_requests
from advgame.rollout.channel import Channel, PublishFailed, PublishTimes, Write, WriteFailed, written_into
from advgame.rollout.engine import EngineDied, EngineError, EngineUnwell, Request
from advgame.rollout.first_token import FirstToken
from advgame.rollout.settings import VllmSettings
from advgame.rollout.vllm_open import opened
from advgame.rollout.vllm_process import Launch, Order, Process, launch
from advgame.rollout.vllm_requests import Answer

PAUSE_MODES = {"finish": "wait", "keep": "keep", "abort": "abort"}
"""Our word for what happens to requests in flight -> vLLM's."""

WATCH_S = 0.5
"""Seconds between looks at an engine's processes."""

HEAR_S = 0.1
"""Seconds that a restart leaves to the callers of the engine that died."""


class VllmEngine:
    """One model behind AsyncLLM, in a process of its own.

    text_stops: vLLM loads the folder's tokenizer, so that requests may stop at a text; without it they are refused.

    channel: how weights arrive; None for a model that never changes. restore: writes the weights of the current
    version, asked after a restart (None: the folder's own are the current ones). counters: `<name>_restarts`,
    `<name>_publish_failures`, `<name>_breaker`, and of all prompts `<name>_prompt_tokens` and, found in the prefix
    cache, `<name>_cached_tokens`. replica: which of the `rollout.vllm.devices` of this name is its own. launch: where
    it runs. Use from one event loop only.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        settings: VllmSettings,
        dtype: str,
        stop_ids: Sequence[int],
        channel: Channel | None = None,
        restore: Write | None = None,
        version: int = 0,
        counters: Counter[str] | None = None,
        text_stops: bool = False,
        replica: int = 0,
        launch: Launch = launch,
    ):
        self.folder, self.name, self.settings = folder, name, settings
        self.restore = restore
        self.counters = Counter[str]() if counters is None else counters
        self.last_publish = PublishTimes()
        self.first_token = FirstToken()
        self._dtype, self._stop_ids, self._text_stops = dtype, tuple(stop_ids), text_stops
        self._replica, self._launch = replica, launch
        self._channel = channel
        self._version = version
        self._numbers = itertools.count()
        self._publishes = self._restarts = self._strikes = 0
        self._lock = asyncio.Lock()
        self._process: Process | None = None
        self._started = False
        self._died: asyncio.Future[None] | None = None
        self._watcher: asyncio.Task[None] | None = None

    @property
    def version(self) -> int:
        return self._version

    @property
    def notes(self) -> tuple[str, ...]:
        return () if self._channel is None else self._channel.notes

    @property
    def process_ids(self) -> list[int]:
        """Of the engine's own processes; empty before the start."""
        return [] if self._process is None else self._process.process_ids

    @property
    def serving(self) -> bool:
        """Whether a request would be answered without a start before it."""
        return self._process is not None and self._process.alive()

    @property
    def spent(self) -> bool:
        """Whether it will not be restarted again."""
        return self._restarts >= self.settings.restarts

    async def start(self) -> None:
        """Starts the engine and connects the channel; does nothing if it runs. Raises EngineDied if it cannot."""
        await self._serving()

    async def generate(self, request: Request) -> Sample:
        """Samples one completion with vLLM's seeded sampling and raw (untempered) log-probs.

        The sample carries the version that made its first token: with `in_flight: keep` later tokens may come from
        newer weights. Raises EngineError for a request that cannot be served (too long, empty, an id outside the
        vocabulary) or was aborted by a publish; EngineUnwell if it took longer than `request_timeout_s` or came back
        with log-probs that are none; EngineDied if the engine's process ended.
        """
        vllm_requests.check(request, self.name, text_stops=self._text_stops)
        process = await self._serving()
        vllm_requests.check_fits(request, self.name, process.positions, process.vocabulary)
        made = await self._answer(process, request)
        if made.finish_reason not in ("stop", "length"):
            raise EngineError(f"{self.name}: the request ended by {made.finish_reason}")
        if not made.usable:
            raise self._struck(process, "log-probs that are not finite or above 0")
        self._strikes = 0
        self.counters[f"{self.name}_prompt_tokens"] += len(request.prompt_ids)
        self.counters[f"{self.name}_cached_tokens"] += made.cached_tokens
        # where vLLM says no version nothing runs during a publish (`finish`), and the engine's is right
        version = self._version if made.version is None else made.version
        return Sample(request.prompt_ids, made.token_ids, made.logprobs, made.finish_reason, version)

    async def publish(self, version: int, write: Write) -> None:
        """Quiesce, write, deliver, reset the caches, stamp, resume; each part is timed (`last_publish`).

        `write` runs exactly once. If the engine dies or fails in any part, it is killed, since its weights may be
        of two versions, and a new one is started and given the weights of `version`. Raises EngineDied when that
        fails too.
        """
        await self._serving()
        async with self._lock:
            try:
                await self._attempt(version, write, None)
            except PublishFailed as failure:
                self._version = version
                await self._restart(self.restore if failure.written else write)

    async def attempt(self, version: int, write: Write, turn: Callable[[], Awaitable[None]] | None = None) -> None:
        """A publish into a started engine without a second chance; `turn` is awaited before the write.

        Raises PublishFailed with the engine killed and its version the old one; who called restarts it.
        """
        async with self._lock:
            await self._attempt(version, write, turn)

    async def _attempt(self, version: int, write: Write, turn: Callable[[], Awaitable[None]] | None) -> None:
        if self._channel is None:
            raise EngineError(f"{self.name}: this engine was started for a frozen model; it takes no weights")
        written = False
        marks = [time.perf_counter()]

        async def part(step: Awaitable[None]) -> None:
            async with asyncio.timeout(self.settings.publish_timeout_s):
                await step
            marks.append(time.perf_counter())

        every = self.settings.verify_every
        self._publishes += 1
        verify = bool(every) and self._publishes % every == 0
        try:
            if (process := self._process) is None:  # it died between the caller's look and the lock
                raise EngineDied(f"{self.name}: the engine's process ended")
            await part(process.pause(PAUSE_MODES[self.settings.in_flight]))
            if turn is not None:
                await turn()
            async with self._channel.turn():
                marks[-1] = time.perf_counter()
                written = True
                written_into(self._channel, write, verify=verify)
                marks.append(time.perf_counter())
                await part(self._channel.deliver(process, verify=verify))
            await part(process.reset_caches())
            await part(process.stamp(version))
            self._version = version
            await part(process.resume())
        except WriteFailed as failure:
            # the trainer's own error: its average may be half updated, so nothing can be put right here
            self._kill()
            raise failure.error from None
        except Exception as error:
            self.counters[f"{self.name}_publish_failures"] += 1
            self._kill()
            raise PublishFailed(f"{self.name}: a publish failed: {type(error).__name__}: {error}", written) from error
        except BaseException:
            # cancelled in between: its weights may be of two versions, and nobody is left to bring the others
            self._kill()
            self._version = version if written else self._version
            raise
        self.last_publish = PublishTimes(*(b - a for a, b in itertools.pairwise(marks)))

    async def close(self) -> None:
        """Ends the engine's process and releases what the channel maps."""
        async with self._lock:
            if self._process is not None and self._process.alive():
                self._process.end()
            self._kill()
            if self._channel is not None:
                self._channel.close()

    async def _serving(self) -> Process:
        """The running engine: started on first use, restarted at the current version after a death."""
        if self._process is not None and self._process.alive():
            return self._process
        async with self._lock:
            if self._process is not None and not self._process.alive():
                self._kill()
            if self._process is None:
                if self._started:
                    await self._restart(self.restore)
                else:
                    await self._open(None)
                    self._started = True
            assert self._process is not None
            return self._process

    async def _restart(self, write: Write | None) -> None:
        """A new process at the current version; gives up after `restarts` in this engine's life."""
        if self.spent:
            raise EngineDied(f"{self.name}: the engine died and has been restarted {self._restarts} times already")
        self._restarts += 1
        self.counters[f"{self.name}_restarts"] += 1
        # a start may hold the event loop for seconds: whoever was waiting for the dead engine shall hear of it first
        await asyncio.sleep(HEAR_S)
        await self._open(write)

    async def _open(self, write: Write | None) -> None:
        """Starts a process; nobody sees it before it has its weights and carries its version."""
        order = Order(
            self.folder,
            self.settings,
            self._dtype,
            self._stop_ids,
            tokenizer=self._text_stops,
            device=self.settings.device_of(self.name, self._replica),
        )
        process = await opened(self.name, order, self._launch, self._channel, write, lambda: self._version)
        self._process, self._strikes = process, 0
        self._died = asyncio.get_running_loop().create_future()
        self._watcher = asyncio.create_task(self._watch(process, self._died))

    async def _answer(self, process: Process, request: Request) -> Answer:
        """vLLM's answer, or a typed error. A death ends the wait even where vLLM itself would wait for ever."""
        probe = self.first_token.claim()
        sampled = self.first_token.sampled if probe else None
        assert self._died is not None
        died = self._died
        answer = asyncio.create_task(process.answer(request, f"{self.name}-{next(self._numbers)}", sampled))
        limit = self.settings.request_timeout_s
        either: set[asyncio.Future[Any]] = {died, answer}
        try:
            await asyncio.wait(either, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not answer.done():
                answer.cancel()
            if probe:
                self.first_token.release()
        if answer.done():
            try:
                return answer.result()
            except Exception as error:
                if isinstance(error, EngineDied) or process is not self._process or not process.alive():
                    raise EngineDied(f"{self.name}: the engine's process ended") from None
                raise EngineError(f"{self.name}: {error}") if isinstance(error, EngineError) else error from None
        # nobody waits for it any more
        answer.add_done_callback(lambda task: task.cancelled() or task.exception())
        if died.done():
            raise EngineDied(f"{self.name}: the engine's process ended")
        raise self._struck(process, f"no answer within {limit} s")

    def _struck(self, process: Process, what: str) -> EngineUnwell:
        """Counts against the engine; after `breaker` in a row it is killed, and the next request restarts it."""
        if process is self._process:
            self._strikes += 1
            if self.settings.breaker and self._strikes >= self.settings.breaker:
                self.counters[f"{self.name}_breaker"] += 1
                self._kill()
        return EngineUnwell(f"{self.name}: {what}")

    async def _watch(self, process: Process, died: asyncio.Future[None]) -> None:
        """Notices a death that vLLM does not tell of: one while a request is on its way, for example."""
        while not died.done():
            await asyncio.sleep(WATCH_S)
            if not process.alive() and not died.done():
                died.set_result(None)

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None
            if self._died is not None and not self._died.done():
                self._died.set_result(None)
