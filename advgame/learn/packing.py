"""Packed batches: sequences side by side without padding, a shared prompt once, and the rows whose next token was
sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from advgame.game.tree import Sample


class Span(NamedTuple):
    """A run of packed tokens: each attends to those before it in the run, and to all of the run's prefix.

    `prefix` is where the prefix starts, `shared` its length (0: none). Positions run on from the prefix.
    """

    start: int
    length: int
    prefix: int = 0
    shared: int = 0


@dataclass(frozen=True)
class PackedBatch:
    """Sequences one after another in one row of tokens.

    A sequence is its prompt and its completion less the last token, which no loss needs as an input; a prompt
    that several share stands once, before all of their completions. Positions are those that each sequence has
    alone. `rows` are the tokens whose hidden states predict the completions, in the order of the samples (the
    last row of a shared prompt appears once a sequence), `labels` what was sampled there, `sampler_logps` its
    log-prob, `owner` its sample. Bounds live on the host: nothing on the path waits for a device. `unshared` is
    the number of tokens without sharing.
    """

    input_ids: Int[Tensor, "1 tokens"]
    position_ids: Int[Tensor, "1 tokens"]
    spans: tuple[Span, ...]
    rows: Int[Tensor, " rows"]
    labels: Int[Tensor, " rows"]
    sampler_logps: Float[Tensor, " rows"]
    owner: Int[Tensor, " rows"]
    row_bounds: tuple[int, ...]
    unshared: int

    @property
    def sequences(self) -> int:
        return len(self.row_bounds) - 1

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]


def input_length(sample: Sample) -> int:
    """Tokens that `sample` occupies in a packed batch of its own."""
    return len(sample.prompt_ids) + len(sample.token_ids) - 1


def pack(samples: Sequence[Sample], device: torch.device | str = "cpu", *, share: bool = False) -> PackedBatch:
    """Packs `samples`; with `share`, those of equal prompt ids stand together behind one copy of it.

    Every one needs a non-empty prompt and completion (ValueError).
    """
    for i, sample in enumerate(samples):
        if not sample.prompt_ids or not sample.token_ids:
            raise ValueError(f"samples[{i}] has an empty {'prompt' if sample.token_ids else 'completion'}")
    families: dict[object, list[int]] = {}
    for i, sample in enumerate(samples):
        families.setdefault(sample.prompt_ids if share else i, []).append(i)

    tokens: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
    rows: list[Sequence[int]] = [()] * len(samples)

    def put(ids: Sequence[int], prefix: int = 0, shared: int = 0) -> int:
        start = len(tokens)
        tokens.extend(ids)
        positions.extend(range(shared, shared + len(ids)))
        if ids:
            spans.append(Span(start, len(ids), prefix, shared))
        return start

    for members in families.values():
        prompt = samples[members[0]].prompt_ids
        length = len(prompt)
        if len(members) == 1:
            (i,) = members
            start = put((*prompt, *samples[i].token_ids[:-1]))
            rows[i] = range(start + length - 1, len(tokens))
            continue
        root = put(prompt)
        for i in members:
            start = put(samples[i].token_ids[:-1], root, length)
            rows[i] = (root + length - 1, *range(start, len(tokens)))

    target = torch.device(device)

    def on_device(values: Sequence[int] | Sequence[float], dtype: torch.dtype) -> Tensor:
        return to_device(torch.tensor(values, dtype=dtype), target)

    return PackedBatch(
        input_ids=on_device(tokens, torch.long).unsqueeze(0),
        position_ids=on_device(positions, torch.long).unsqueeze(0),
        spans=tuple(spans),
        rows=on_device([row for own in rows for row in own], torch.long),
        labels=on_device([t for s in samples for t in s.token_ids], torch.long),
        sampler_logps=on_device([lp for s in samples for lp in s.logprobs], torch.float32),
        owner=on_device([i for i, s in enumerate(samples) for _ in s.token_ids], torch.long),
        row_bounds=(0, *accumulate(len(s.token_ids) for s in samples)),
        unshared=sum(input_length(s) for s in samples),
    )


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device without waiting for it: through pinned memory where there is a GPU."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
