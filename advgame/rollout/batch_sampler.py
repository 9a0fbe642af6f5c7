"""One padded batch of completions from a Hugging Face model: every row from its own random stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from advgame.rollout.engine import Request

Completion = tuple[tuple[int, ...], tuple[float, ...], str]
"""Token ids, their untempered log-probs, finish reason."""

Complete = Callable[[Sequence[Request], Callable[[], None] | None], list[Completion]]
"""Samples a batch; the second argument is called when its first tokens are there."""


class BatchSampler:
    """Samples batches with one model, which it sets to evaluation."""

    def __init__(self, model: PreTrainedModel, stop_ids: Sequence[int], pad_id: int):
        self.model = model.eval().requires_grad_(False)
        # the folder's own generation_config (penalties, top-k) would shape the scores that log-probs are read from
        self.model.generation_config = GenerationConfig(eos_token_id=list(stop_ids), pad_token_id=pad_id)
        self._stop_ids = tuple(stop_ids)
        self._pad_id = pad_id

    @torch.no_grad()
    def sample(self, requests: Sequence[Request], on_first: Callable[[], None] | None = None) -> list[Completion]:
        """One completion a request, in their order; `on_first` is called once their first tokens are there."""
        width = max(len(r.prompt_ids) for r in requests)
        device = self.model.device
        ids = torch.full((len(requests), width), self._pad_id)
        mask = torch.zeros((len(requests), width), dtype=torch.long)
        for row, request in enumerate(requests):
            ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask[row, width - len(request.prompt_ids) :] = 1
        longest = max(r.sampling.max_tokens for r in requests)
        sampler = RowSampler(requests, longest, device, on_first)
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

    def _cut(self, request: Request, tokens: list[int], logprobs: list[float]) -> Completion:
        """Ends a row at its first stop token or at its own max_tokens."""
        limit = request.sampling.max_tokens
        for i, token in enumerate(tokens[:limit]):
            if token in self._stop_ids:
                return tuple(tokens[: i + 1]), tuple(logprobs[: i + 1]), "stop"
        return tuple(tokens[:limit]), tuple(logprobs[:limit]), "length"


class RowSampler(LogitsProcessor):
    """Samples every row by inverse transform from its own uniform numbers and keeps untempered log-probs.

    Passed to greedy `generate`, it leaves one finite score a row: the sampled token's.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        steps: int,
        device: torch.device,
        on_first: Callable[[], None] | None = None,
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
        self._on_first = on_first
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
        if self._on_first is not None:
            if scores.is_cuda:
                torch.cuda.synchronize(scores.device)  # once a publish: the token is there, not only asked for
            self._on_first()
            self._on_first = None
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def nucleus(probs: Tensor, top_p: Tensor) -> Tensor:  # (rows, vocab), (rows, 1)
    """`probs` outside the smallest set of tokens that holds `top_p` of the mass set to zero (not renormalised)."""
    ordered, order = probs.sort(-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    return probs.masked_fill(outside.gather(-1, order.argsort(-1)), 0.0)
