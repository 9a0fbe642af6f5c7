"""One batch of completions from a Hugging Face model: every row from its own random stream.

Requests with the same prompt share its prefill, and rows that have ended leave the batch: `generate` would compute
every prompt again and carry every row to the end of the longest.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from advgame.errors import InputError
from advgame.rollout.engine import Request, end_of_stop

Completion = tuple[tuple[int, ...], tuple[float, ...], str]
"""Token ids, their untempered log-probs, finish reason."""

Complete = Callable[[Sequence[Request], Callable[[], None] | None], list[Completion]]
"""Samples a batch; the second argument is called when its first tokens are there."""


Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens left out."""


def check_samplable(model: PreTrainedModel, field: str) -> None:
    """InputError, naming `field`, for a model that keeps no keys and values between tokens."""
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise InputError(
            f"{field}: {type(model).__name__} has no key-value cache, which the embedded engine decodes with; "
            "set rollout.engine: vllm, or give another model"
        )


class BatchSampler:
    """Samples batches with one model (see `check_samplable`), which it sets to evaluation.

    decode: the tokenizer's, for requests with stop texts.
    """

    def __init__(self, model: PreTrainedModel, stop_ids: Sequence[int], pad_id: int, decode: Decode | None = None):
        self.model = model.eval().requires_grad_(False)
        self._stop_ids = frozenset(stop_ids)
        self._pad_id = pad_id
        self._stop_texts = None if decode is None else StopTexts(decode)
        self._takes = frozenset(inspect.signature(model.forward).parameters)

    @torch.no_grad()
    def sample(self, requests: Sequence[Request], on_first: Callable[[], None] | None = None) -> list[Completion]:
        """One completion a request, in their order; `on_first` is called once their first tokens are there."""
        rows = [Row(request) for request in requests]
        draw = Draw(requests, self.model.device)
        logits, cache, mask = self._prefill([request.prompt_ids for request in requests])
        live, drawn = rows, []
        while True:
            tokens, logprobs = draw(logits)
            drawn.append((live, logprobs))
            for row, token in zip(live, tokens.tolist(), strict=True):
                self._extend(row, token)
            if on_first is not None:
                on_first()
                on_first = None
            going = [i for i, row in enumerate(live) if not row.ended]
            if not going:
                break
            if len(going) < len(live):
                kept = torch.tensor(going, device=mask.device)
                live = [live[i] for i in going]
                tokens, mask = tokens[kept], mask[kept]
                cache.reorder_cache(kept)
                draw.keep(kept)
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], 1)
            positions = mask.sum(1, keepdim=True) - 1
            logits = self._forward(tokens[:, None], mask, positions, past_key_values=cache).logits[:, -1]
        values = iter(torch.cat([one for _, one in drawn]).tolist())  # one copy from the device
        for some, _ in drawn:
            for row in some:
                row.logprobs.append(next(values))
        return [row.completion for row in rows]

    def _prefill(self, prompts: Sequence[tuple[int, ...]]) -> tuple[Tensor, Any, Tensor]:
        """The next token's logits (rows, vocab), the cache, and which of its places are real (rows, width)."""
        device = self.model.device
        different = {prompt: n for n, prompt in enumerate(dict.fromkeys(prompts))}
        width = max(map(len, different))
        ids = torch.tensor([[self._pad_id] * (width - len(p)) + list(p) for p in different], device=device)
        lengths = torch.tensor([len(prompt) for prompt in different], device=device)
        mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
        out = self._forward(ids, mask, (mask.cumsum(1) - 1).clamp_min(0))
        cache = out.past_key_values
        of_row = torch.tensor([different[prompt] for prompt in prompts], device=device)
        if len(different) < len(prompts):
            cache.reorder_cache(of_row)  # made for beams, and takes any selection of rows
        return out.logits[of_row, -1], cache, mask[of_row]

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, **cache: Any) -> Any:
        """Logits at least of the last token; models with positions of their own are told the mask only."""
        wanted = {"position_ids": positions, "logits_to_keep": 1}
        known = {name: value for name, value in wanted.items() if name in self._takes}
        return self.model(input_ids=ids, attention_mask=mask, use_cache=True, return_dict=True, **known, **cache)

    def _extend(self, row: Row, token: int) -> None:
        """Adds a token; the row ends at a stop token, behind its stop text or at its own max_tokens."""
        row.tokens.append(token)
        at_text = self._stop_texts is not None and self._stop_texts.end(row.tokens, row.request.stop)
        if token in self._stop_ids or at_text:
            row.ended = "stop"
        elif len(row.tokens) >= row.request.sampling.max_tokens:
            row.ended = "length"


class Row:
    """One completion under way. ended: its finish reason, empty until then."""

    def __init__(self, request: Request):
        self.request = request
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.ended = ""

    @property
    def completion(self) -> Completion:
        return tuple(self.tokens), tuple(self.logprobs), self.ended


class Draw:
    """Samples every row by inverse transform from its own uniform numbers; log-probs are untempered."""

    def __init__(self, requests: Sequence[Request], device: torch.device):
        longest = max(request.sampling.max_tokens for request in requests)
        uniforms = np.zeros((len(requests), longest), np.float32)
        for row, request in enumerate(requests):
            limit = request.sampling.max_tokens
            uniforms[row, :limit] = np.random.Generator(np.random.Philox(request.seed)).random(limit)
        self._uniforms = torch.from_numpy(uniforms).to(device)  # (rows, steps)
        temperature = torch.tensor([[r.sampling.temperature] for r in requests], device=device)
        self._greedy = temperature == 0
        self._inverse_temperature = torch.where(self._greedy, 1.0, 1.0 / temperature)  # (rows, 1)
        self._top_p = torch.tensor([[r.sampling.top_p] for r in requests], device=device)
        self._any_greedy = any(r.sampling.temperature == 0 for r in requests)
        self._any_top_p = any(r.sampling.top_p < 1 for r in requests)
        self._step = 0

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows (indices) only."""
        self._uniforms, self._greedy = self._uniforms[rows], self._greedy[rows]
        self._inverse_temperature, self._top_p = self._inverse_temperature[rows], self._top_p[rows]

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:  # (rows, vocab) -> (rows,) tokens, (rows,) log-probs
        logits = logits.float()
        uniform = self._uniforms[:, self._step : self._step + 1]
        self._step += 1
        probs = torch.softmax(logits * self._inverse_temperature, -1)
        if self._any_top_p:
            probs = nucleus(probs, self._top_p)
        cumulative = probs.cumsum(-1)
        chosen = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        # rounding may put the target past the last token that has mass
        chosen = chosen.clamp_max(probs.shape[-1] - 1)
        chosen = torch.where(probs.gather(1, chosen) > 0, chosen, probs.argmax(-1, keepdim=True))
        if self._any_greedy:
            chosen = torch.where(self._greedy, logits.argmax(-1, keepdim=True), chosen)
        logprobs = logits.gather(1, chosen) - logits.logsumexp(-1, keepdim=True)
        return chosen[:, 0], logprobs[:, 0]


class StopTexts:
    """Finds the token that completes a stop text.

    Keeps the text of single tokens: only one that holds the last character of a stop text can complete it, and only
    then the row's end is decoded.
    """

    def __init__(self, decode: Decode):
        self._decode = decode
        self._texts: dict[int, str] = {}

    def end(self, tokens: Sequence[int], stop: Sequence[str]) -> bool:
        """Whether the last of `tokens` completes one of `stop`."""
        if not stop:
            return False
        last = tokens[-1]
        if last not in self._texts:
            self._texts[last] = self._decode([last])
        if not any(word[-1] in self._texts[last] for word in stop):
            return False
        # a token of a stop text holds at least one of its characters
        return end_of_stop(self._decode(tokens[-max(map(len, stop)) :]), stop) is not None


def nucleus(probs: Tensor, top_p: Tensor) -> Tensor:  # (rows, vocab), (rows, 1)
    """`probs` outside the smallest set of tokens that holds `top_p` of the mass set to zero (not renormalised)."""
    ordered, order = probs.sort(-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    return probs.masked_fill(outside.gather(-1, order.argsort(-1)), 0.0)
