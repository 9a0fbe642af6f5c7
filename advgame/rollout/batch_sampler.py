"""One padded batch of completions from a Hugging Face model: every row from its own random stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from advgame.rollout.engine import Request, end_of_stop

Completion = tuple[tuple[int, ...], tuple[float, ...], str]
"""Token ids, their untempered log-probs, finish reason."""

Complete = Callable[[Sequence[Request], Callable[[], None] | None], list[Completion]]
"""Samples a batch; the second argument is called when its first tokens are there."""


Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens left out."""


class BatchSampler:
    """Samples batches with one model, which it sets to evaluation.

    decode: the tokenizer's, for requests with stop texts.
    """

    def __init__(self, model: PreTrainedModel, stop_ids: Sequence[int], pad_id: int, decode: Decode | None = None):
        self.decode = decode
        self._texts: dict[int, str] = {}
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
        stops = None
        if self.decode is not None and any(r.stop for r in requests):
            stops = TextStops(requests, self.decode, self._texts)
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
            stopping_criteria=StoppingCriteriaList([] if stops is None else [stops]),
        )
        tokens = out[:, width:].cpu().tolist()
        logprobs = torch.stack(sampler.logprobs, 1).cpu().tolist()
        ends = [None] * len(requests) if stops is None else stops.ends
        return [self._cut(r, t, lp, end) for r, t, lp, end in zip(requests, tokens, logprobs, ends, strict=True)]

    def _cut(self, request: Request, tokens: list[int], logprobs: list[float], end: int | None) -> Completion:
        """Ends a row at its first stop token, behind its stop text (`end` tokens) or at its own max_tokens."""
        limit = request.sampling.max_tokens
        for i, token in enumerate(tokens[:limit]):
            if token in self._stop_ids or i + 1 == end:
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


class TextStops(StoppingCriteria):
    """Ends each row at the token that completes one of its request's stop texts.

    ends: for each row the number of tokens up to and with that one, None while there is none. `texts` keeps the text
    of single tokens between calls: only a token that holds the last character of a stop text can complete it, and only
    then the row's end is decoded.
    """

    def __init__(self, requests: Sequence[Request], decode: Decode, texts: dict[int, str]):
        self.ends: list[int | None] = [None] * len(requests)
        self._stops = [request.stop for request in requests]
        self._decode, self._texts = decode, texts
        self._tokens: list[list[int]] = [[] for _ in requests]

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:  # (rows, prompt + step) -> (rows,) bool
        for row, token in enumerate(input_ids[:, -1].tolist()):
            tokens, stop = self._tokens[row], self._stops[row]
            tokens.append(token)
            if self.ends[row] is None and stop and self._may_end(token, stop):
                # a token of a stop text holds at least one of its characters
                tail = tokens[-max(map(len, stop)) :]
                if end_of_stop(self._decode(tail), stop) is not None:
                    self.ends[row] = len(tokens)
        return torch.tensor([end is not None for end in self.ends], device=input_ids.device)

    def _may_end(self, token: int, stop: Sequence[str]) -> bool:
        if token not in self._texts:
            self._texts[token] = self._decode([token])
        return any(word[-1] in self._texts[token] for word in stop)


def nucleus(probs: Tensor, top_p: Tensor) -> Tensor:  # (rows, vocab), (rows, 1)
    """`probs` outside the smallest set of tokens that holds `top_p` of the mass set to zero (not renormalised)."""
    ordered, order = probs.sort(-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    return probs.masked_fill(outside.gather(-1, order.argsort(-1)), 0.0)
