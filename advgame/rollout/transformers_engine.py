"""The embedded engine: batched sampling with a Hugging Face model in this process.

Each row draws from its own random stream and records untempered log-probs, so that a completion depends on its
request and the weights, not on its neighbours in the batch (up to the rounding of batched matrix products).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from advgame.game.tree import Sample
from advgame.rollout.batch_sampler import BatchSampler, Complete, Decode
from advgame.rollout.engine import EngineError, Request
from advgame.rollout.first_token import FirstToken
from advgame.rollout.sampler_process import SamplerProcess

QUIET_SPINS = 24
"""Event-loop turns without a new request after which a batch is complete: the longest chain of coroutines
between an answer and the next request is shorter (gather -> judge -> gather)."""


class TransformersEngine:
    """One model, sampled in batches of requests that wait together.

    deterministic: batches are formed in this thread, from all requests that wait once every tree is blocked, in
        the order of their keys; the same trees make the same batches. Otherwise a batch runs in a worker thread
        and the next one takes whatever has arrived meanwhile.
    decode: the tokenizer's, for requests with stop texts; without it they are refused.
    elsewhere: a child process that computes instead of this one, which then merely waits; same batches, same bits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        stop_ids: Sequence[int],
        pad_id: int,
        batch: int = 256,
        deterministic: bool = True,
        version: int = 0,
        decode: Decode | None = None,
        elsewhere: SamplerProcess | None = None,
    ):
        sampler = BatchSampler(model, stop_ids, pad_id, decode)
        self.model = sampler.model
        self._stops_at_text = decode is not None
        self._elsewhere = elsewhere
        self._complete: Complete = sampler.sample
        if elsewhere is not None:
            self._complete = elsewhere.add(sampler)
        self._batch = batch
        self._deterministic = deterministic
        self._version = version
        self.first_token = FirstToken()
        self._waiting: list[tuple[Request, asyncio.Future[Sample]]] = []
        self._worker: asyncio.Task[None] | None = None
        self._idle = asyncio.Lock()

    @property
    def version(self) -> int:
        return self._version

    async def start(self) -> None:
        """The model was loaded with the engine; a child process starts now rather than at the first batch."""
        if self._elsewhere is not None:
            self._elsewhere.start()

    async def generate(self, request: Request) -> Sample:
        """Samples one completion. Raises EngineError if the model cannot (the message says why)."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit and len(request.prompt_ids) + request.sampling.max_tokens > limit:
            raise EngineError(
                f"prompt of {len(request.prompt_ids)} tokens + max_tokens {request.sampling.max_tokens} exceeds "
                f"the model's {limit} positions"
            )
        if request.stop and not self._stops_at_text:
            raise EngineError("a stop text was asked for, and this engine has no tokenizer")
        future: asyncio.Future[Sample] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._drain())
        return await future

    async def publish(self, version: int, write: Callable[[Mapping[str, Tensor]], None]) -> None:
        """Waits for the running batch, then lets `write` fill the parameters in place."""
        async with self._idle:
            with torch.inference_mode(False), torch.no_grad():
                write(dict(self.model.named_parameters()))
            self._version = version

    async def close(self) -> None:
        for _, future in self._waiting:
            future.cancel()
        if self._worker is not None:
            await self._worker
        if self._elsewhere is not None:
            self._elsewhere.leave()
            self._elsewhere = None

    async def _drain(self) -> None:
        while self._waiting:
            if self._deterministic:
                await self._settle()
                self._waiting.sort(key=lambda item: item[0].key)
            # nobody waits for the cancelled ones any more
            self._waiting = [item for item in self._waiting if not item[1].done()]
            if not self._waiting:
                break
            batch, self._waiting = self._waiting[: self._batch], self._waiting[self._batch :]
            async with self._idle:
                await self._run(batch)

    async def _settle(self) -> None:
        """Returns once no request has arrived for some turns of the event loop, all in one thread: repeatable."""
        quiet, seen = 0, len(self._waiting)
        while quiet < QUIET_SPINS:
            await asyncio.sleep(0)
            quiet = quiet + 1 if len(self._waiting) == seen else 0
            seen = len(self._waiting)

    async def _run(self, batch: Sequence[tuple[Request, asyncio.Future[Sample]]]) -> None:
        requests = [request for request, _ in batch]
        try:
            if self._deterministic:
                samples = self._sample(requests)
            else:
                samples = await asyncio.to_thread(self._sample, requests)
        except Exception as error:
            # RuntimeError covers memory and shapes, which a retry in another batch may survive; others are bugs, and
            # whoever waits must hear of them
            known = isinstance(error, RuntimeError | ValueError)
            for _, future in batch:
                if not future.done():
                    future.set_exception(EngineError(f"{type(error).__name__}: {error}") if known else error)
            return
        for (_, future), sample in zip(batch, samples, strict=True):
            if not future.done():
                future.set_result(sample)

    def _sample(self, requests: Sequence[Request]) -> list[Sample]:
        first = self.first_token.sampled if self.first_token.claim() else None
        made = zip(requests, self._complete(requests, first), strict=True)
        return [Sample(r.prompt_ids, tokens, logps, reason, self._version) for r, (tokens, logps, reason) in made]
