"""The vLLM engine: continuous batching behind the engine protocol, weights through a channel, restarts when it dies."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

from advgame.errors import InputError
from advgame.game.tree import Sample
from advgame.publish.channels import guard
from advgame.publish.record import PlanRefused
from advgame.rollout import vllm_requests, vllm_start
from advgame.rollout.channel import Channel, PublishTimes, Write
from advgame.rollout.engine import EngineDied, EngineError, Request
from advgame.rollout.first_token import FirstToken
from advgame.rollout.settings import VllmSettings

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
    `<name>_publish_failures`, and of all prompts `<name>_prompt_tokens` and, found in the prefix cache,
    `<name>_cached_tokens`. Use from one event loop only.
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
    ):
        self.folder, self.name, self.settings = folder, name, settings
        self.restore = restore
        self.counters = Counter[str]() if counters is None else counters
        self.last_publish = PublishTimes()
        self._dtype = dtype
        self._text_stops = text_stops
        self._stop_ids = list(stop_ids)
        self._channel = channel
        self._version = version
        self._numbers = itertools.count()
        self._publishes = 0
        self._lock = asyncio.Lock()
        self._llm: Any = None
        self._vocabulary = 0
        self._positions = 0
        self._started = False
        self._restarts = 0
        self._died: asyncio.Future[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self.first_token = FirstToken()

    @property
    def version(self) -> int:
        return self._version

    @property
    def notes(self) -> tuple[str, ...]:
        return () if self._channel is None else self._channel.notes

    @property
    def process_ids(self) -> list[int]:
        """Of the engine's own processes; empty before the start."""
        return [] if self._llm is None else vllm_start.process_ids(self._llm)

    async def start(self) -> None:
        """Starts the engine and connects the channel; does nothing if it runs. Raises EngineDied if it cannot."""
        await self._serving()

    async def generate(self, request: Request) -> Sample:
        """Samples one completion with vLLM's seeded sampling and raw (untempered) log-probs.

        The sample carries the version that made its first token: with `in_flight: keep` later tokens may come from
        newer weights. Raises EngineError for a request that cannot be served (too long, empty, an id outside the
        vocabulary), was aborted by a publish or took longer than `request_timeout_s`; EngineDied if the engine's
        process ended.
        """
        vllm_requests.check(request, self.name, text_stops=self._text_stops)
        llm = await self._serving()
        vllm_requests.check_fits(request, self.name, self._positions, self._vocabulary)
        final = await self._answer(llm, request)
        made = final.outputs[0]
        if made.finish_reason not in ("stop", "length"):
            raise EngineError(f"{self.name}: the request ended by {made.finish_reason}")
        tokens = tuple(made.token_ids)
        self.counters[f"{self.name}_prompt_tokens"] += len(request.prompt_ids)
        self.counters[f"{self.name}_cached_tokens"] += getattr(final, "num_cached_tokens", None) or 0
        logprobs = tuple(step[token].logprob for step, token in zip(made.logprobs, tokens, strict=True))
        version = vllm_requests.version_of(made, self._version)
        return Sample(request.prompt_ids, tokens, logprobs, made.finish_reason, version)

    async def publish(self, version: int, write: Write) -> None:
        """Quiesce, write, deliver, reset the caches, stamp, resume; each part is timed (`last_publish`).

        `write` runs exactly once. If the engine dies or fails in any part, it is killed, since its weights may be
        of two versions, and a new one is started and given the weights of `version`. Raises EngineDied when that
        fails too.
        """
        if self._channel is None:
            raise EngineError(f"{self.name}: this engine was started for a frozen model; it takes no weights")
        llm = await self._serving()
        async with self._lock:
            written = False
            marks = [time.perf_counter()]

            async def part(step: Awaitable[None]) -> None:
                async with asyncio.timeout(self.settings.publish_timeout_s):
                    await step
                marks.append(time.perf_counter())

            every = self.settings.verify_every
            self._publishes += 1
            try:
                await part(vllm_start.pause(llm, PAUSE_MODES[self.settings.in_flight]))
                written = True
                self._written(write)
                marks.append(time.perf_counter())
                await part(self._channel.deliver(llm, verify=bool(every) and self._publishes % every == 0))
                await part(vllm_start.reset_caches(llm))
                await part(vllm_start.stamp(llm, version))
                self._version = version
                await part(vllm_start.resume(llm))
            except WriteFailed as failure:
                # the trainer's own error: its average may be half updated, so nothing can be put right here
                self._kill()
                raise failure.error from None
            except Exception:
                self.counters[f"{self.name}_publish_failures"] += 1
                self._kill()
                self._version = version
                await self._restart(self.restore if written else write)
                return
            except BaseException:
                # cancelled in between: its weights may be of two versions, and nobody is left to bring the others
                self._kill()
                self._version = version if written else self._version
                raise
            self.last_publish = PublishTimes(*(b - a for a, b in itertools.pairwise(marks)))

    async def close(self) -> None:
        """Ends the engine's process and releases what the channel maps."""
        async with self._lock:
            if self._llm is not None and vllm_start.alive(self._llm):
                vllm_start.end(self._llm)
            self._kill()
            if self._channel is not None:
                self._channel.close()

    async def _serving(self) -> Any:
        """The running engine: started on first use, restarted at the current version after a death."""
        if self._llm is not None and vllm_start.alive(self._llm):
            return self._llm
        async with self._lock:
            if self._llm is not None and not vllm_start.alive(self._llm):
                self._kill()
            if self._llm is None:
                if self._started:
                    await self._restart(self.restore)
                else:
                    await self._open(None)
                    self._started = True
            return self._llm

    async def _restart(self, write: Write | None) -> None:
        """A new process at the current version; gives up after `restarts` in this engine's life."""
        if self._restarts >= self.settings.restarts:
            raise EngineDied(f"{self.name}: the engine died and has been restarted {self._restarts} times already")
        self._restarts += 1
        self.counters[f"{self.name}_restarts"] += 1
        # a start holds the event loop for seconds: whoever was waiting for the dead engine shall hear of it first
        await asyncio.sleep(HEAR_S)
        await self._open(write)

    async def _open(self, write: Write | None) -> None:
        """Starts a process; nobody sees it before it has its weights and carries its version."""
        channel = self._channel
        arguments = vllm_start.engine_arguments(
            self.folder,
            self.settings,
            dtype=self._dtype,
            direct=channel is not None and channel.direct,
            tokenizer=self._text_stops,
        )
        llm = None
        try:
            more = None if channel is None else channel.prepare()
            llm = vllm_start.start(arguments, self.settings, self.settings.devices.get(self.name), more)  # type: ignore[call-overload]
            async with asyncio.timeout(self.settings.start_timeout_s):
                await guard(llm)
                if channel is not None:
                    await channel.attach(llm)
                    if write is not None:
                        self._written(write)
                        await channel.deliver(llm, verify=True)
                        await vllm_start.reset_caches(llm)
                await vllm_start.stamp(llm, self._version)
        except BaseException as error:  # also of a caller who is cancelled: no process may be left behind
            if llm is not None:
                vllm_start.kill(llm)
            if isinstance(error, WriteFailed | InputError) or not isinstance(error, Exception):
                raise
            if isinstance(error, PlanRefused):
                raise InputError(
                    f"rollout.vllm.transport: {self.settings.transport} cannot write {self.folder} where {self.name} "
                    f"reads it: {'; '.join(error.reasons[:3])}; set loader"
                ) from error
            raise EngineDied(f"{self.name}: vLLM does not start: {type(error).__name__}: {error}") from error
        config = llm.model_config
        self._vocabulary, self._positions = config.get_vocab_size(), config.max_model_len
        self._llm = llm
        self._died = asyncio.get_running_loop().create_future()
        self._watcher = asyncio.create_task(self._watch(llm, self._died))

    async def _answer(self, llm: Any, request: Request) -> Any:
        """vLLM's final output, or a typed error. A death ends the wait even where vLLM itself would wait for ever."""

        # one request tells of each of its tokens: the first one after a publish
        probe = self.first_token.claim()

        async def last() -> Any:
            prompt = {"prompt_token_ids": list(request.prompt_ids)}
            number = f"{self.name}-{next(self._numbers)}"
            how = vllm_requests.parameters(request, self._stop_ids, every_token=probe)
            async for output in llm.generate(prompt, how, number):
                if probe:
                    self.first_token.sampled()
                final = output
            return final

        assert self._died is not None
        died, answer = self._died, asyncio.create_task(last())
        try:
            await asyncio.wait(
                {died, answer}, timeout=self.settings.request_timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            if not answer.done():
                answer.cancel()
            if probe:
                self.first_token.release()
        if answer.done():
            try:
                return answer.result()
            except Exception as error:
                raise self._typed(llm, error) from None
        # nobody waits for it any more
        answer.add_done_callback(lambda task: task.cancelled() or task.exception())
        if died.done():
            raise EngineDied(f"{self.name}: the engine's process ended")
        raise EngineError(f"{self.name}: no answer within {self.settings.request_timeout_s} s")

    async def _watch(self, llm: Any, died: asyncio.Future[None]) -> None:
        """Notices a death that vLLM does not tell of: one while a request is on its way, for example."""
        while not died.done():
            await asyncio.sleep(WATCH_S)
            if not vllm_start.alive(llm) and not died.done():
                died.set_result(None)

    def _written(self, write: Write) -> None:
        assert self._channel is not None
        try:
            write(self._channel.destinations)
        except Exception as error:
            raise WriteFailed(error) from error

    def _kill(self) -> None:
        if self._llm is not None:
            vllm_start.kill(self._llm)
            self._llm = None
            if self._died is not None and not self._died.done():
                self._died.set_result(None)

    def _typed(self, llm: Any, error: Exception) -> Exception:
        """vLLM's exception as ours; anything unknown stays as it is."""
        if vllm_requests.is_death(error) or llm is not self._llm or not vllm_start.alive(llm):
            return EngineDied(f"{self.name}: the engine's process ended")
        return EngineError(f"{self.name}: {error}") if vllm_requests.is_refusal(error) else error


class WriteFailed(Exception):
    """The caller's `write` raised `error`."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error
