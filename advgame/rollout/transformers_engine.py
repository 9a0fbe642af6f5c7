"""The embedded engine: batched sampling with a Hugging Face model in this process.

Each row draws from its own random stream and records untempered log-probs, so that a completion depends on its
request and the weights, not on its neighbours in the batch (up to the rounding of batched matrix products).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from advgame.game.tree import Sample
from advgame.rollout.engine import EngineError, Request
from advgame.rollout.first_token import FirstToken

QUIET_SPINS = 24
"""Event-loop turns without a new request after which a batch is complete: the longest chain of coroutines
between an answer and the next request is shorter (gather -> judge -> gather)."""


class TransformersEngine:
    """One model, sampled in batches of requests that wait together.

    deterministic: batches are formed in this thread, from all requests that wait once every tree is blocked, in
        the order of their keys; the same trees make the same batches. Otherwise a batch runs in a worker thread
        and the next one takes whatever has arrived meanwhile.
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
    ):
        self.model = model.eval().requires_grad_(False)
        # the folder's own generation_config (penalties, top-k) would shape the scores that log-probs are read from
        self.model.generation_config = GenerationConfig(eos_token_id=list(stop_ids), pad_token_id=pad_id)
        self._stop_ids = tuple(stop_ids)
        self._pad_id = pad_id
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
        """Nothing to do: the model was loaded with the engine."""

    async def generate(self, request: Request) -> Sample:
        """Samples one completion. Raises EngineError if the model cannot (the message says why)."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit and len(request.prompt_ids) + request.sampling.max_tokens > limit:
            raise EngineError(
                f"prompt of {len(request.prompt_ids)} tokens + max_tokens {request.sampling.max_tokens} exceeds "
                f"the model's {limit} positions"
            )
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
        if self._worker is not None:
            await self._worker

    async def _drain(self) -> None:
        while self._waiting:
            if self._deterministic:
                await self._settle()
                self._waiting.sort(key=lambda item: item[0].key)
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

    @torch.no_grad()
    def _sample(self, requests: Sequence[Request]) -> list[Sample]:
        width = max(len(r.prompt_ids) for r in requests)
        device = self.model.device
        ids = torch.full((len(requests), width), self._pad_id)
        mask = torch.zeros((len(requests), width), dtype=torch.long)
        for row, request in enumerate(requests):
            ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask[row, width - len(request.prompt_ids) :] = 1
        longest = max(r.sampling.max_tokens for r in requests)
        sampler = RowSampler(requests, longest, device, self.first_token if self.first_token.claim() else None)
        settings = GenerationConfig(
            max_new_tokens=longest,
            do_sample=False,
            eos_token_id=list(self._stop_ids),
            pad_token_id=self._pad_id,
            use_cache=True,
        )
        out: Any = self.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([sampler]),
        )
        tokens = out[:, width:].cpu().tolist()
        logprobs = torch.stack(sampler.logprobs, 1).cpu().tolist()
        return [self._cut(r, t, lp) for r, t, lp in zip(requests, tokens, logprobs, strict=True)]

    def _cut(self, request: Request, tokens: list[int], logprobs: list[float]) -> Sample:
        """Ends a row at its first stop token or at its own max_tokens."""
        for i, token in enumerate(tokens[: request.sampling.max_tokens]):
            if token in self._stop_ids:
                return self._made(request, tokens[: i + 1], logprobs[: i + 1], "stop")
        limit = request.sampling.max_tokens
        return self._made(request, tokens[:limit], logprobs[:limit], "length")

    def _made(self, request: Request, tokens: list[int], logprobs: list[float], reason: str) -> Sample:
        return Sample(request.prompt_ids, tuple(tokens), tuple(logprobs), reason, self._version)


class RowSampler(LogitsProcessor):
    """Samples every row by inverse transform from its own uniform numbers and keeps untempered log-probs.

    Passed to greedy `generate`, it leaves one finite score a row: the sampled token's.
    """

    def __init__(
        self, requests: Sequence[Request], steps: int, device: torch.device, first_token: FirstToken | None = None
    ):
        def uniforms(request: Request) -> np.ndarray:
            drawn = np.random.Generator(np.random.Philox(request.seed)).random(request.sampling.max_tokens)
            return np.resize(drawn, steps)

        self._uniforms = torch.from_numpy(np.stack([uniforms(r) for r in requests])).float().to(device)  # (rows, steps)
        temperatures = torch.tensor([r.sampling.temperature for r in requests], device=device)
        self._greedy = temperatures == 0
        self._any_greedy = bool(self._greedy.any())
        self._inverse_temperature = torch.where(self._greedy, 1.0, 1.0 / temperatures).unsqueeze(1)  # (rows, 1)
        top_p = torch.tensor([r.sampling.top_p for r in requests], device=device).unsqueeze(1)
        self._top_p = top_p if bool((top_p < 1).any()) else None
        self._step = 0
        self._first_token = first_token
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (rows, prompt + step), (rows, vocab)
        scores = scores.float()
        uniform = self._uniforms[:, self._step : self._step + 1]
        self._step += 1
        probs = torch.softmax(scores * self._inverse_temperature, -1)
        if self._top_p is not None:
            probs = nucleus(probs, self._top_p)
        cumulative = probs.cumsum(-1)
        chosen = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        # rounding may put the target past the last token that has mass
        chosen = chosen.clamp_max(probs.shape[-1] - 1)
        chosen = torch.where(probs.gather(1, chosen) > 0, chosen, probs.argmax(-1, keepdim=True))
        if self._any_greedy:
            chosen = torch.where(self._greedy.unsqueeze(1), scores.argmax(-1, keepdim=True), chosen)
        self.logprobs.append((scores.gather(1, chosen) - scores.logsumexp(-1, keepdim=True)).squeeze(1))
        if self._first_token is not None:
            if scores.is_cuda:
                torch.cuda.synchronize(scores.device)  # once a publish: the token is there, not only asked for
            self._first_token.sampled()
            self._first_token = None
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def nucleus(probs: Tensor, top_p: Tensor) -> Tensor:  # (rows, vocab), (rows, 1)
    """`probs` outside the smallest set of tokens that holds `top_p` of the mass set to zero (not renormalised)."""
    ordered, order = probs.sort(-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    return probs.masked_fill(outside.gather(-1, order.argsort(-1)), 0.0)
