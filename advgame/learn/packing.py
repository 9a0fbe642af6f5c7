"""Packed batches: sequences side by side without padding, and the rows whose next token was sampled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from advgame.game.tree import Sample

Unit = TypeVar("Unit")


@dataclass(frozen=True)
class PackedBatch:
    """Sequences one after another in one row of tokens.

    A sequence is its prompt and its completion less the last token, which no loss needs as an input. Positions
    restart at each sequence. `rows` are the tokens whose hidden states predict the completions, `labels` what was
    sampled there, `sampler_logps` its log-prob. Bounds live on the host: nothing on the path waits for a device.
    """

    input_ids: Int[Tensor, "1 tokens"]
    position_ids: Int[Tensor, "1 tokens"]
    token_bounds: tuple[int, ...]
    rows: Int[Tensor, " rows"]
    labels: Int[Tensor, " rows"]
    sampler_logps: Float[Tensor, " rows"]
    row_bounds: tuple[int, ...]

    @property
    def sequences(self) -> int:
        return len(self.row_bounds) - 1


def input_length(sample: Sample) -> int:
    """Tokens that `sample` occupies in a packed batch."""
    return len(sample.prompt_ids) + len(sample.token_ids) - 1


def pack(samples: Sequence[Sample], device: torch.device | str = "cpu") -> PackedBatch:
    """Packs `samples` in their order. Every one needs a non-empty prompt and completion (ValueError)."""
    for i, sample in enumerate(samples):
        if not sample.prompt_ids or not sample.token_ids:
            raise ValueError(f"samples[{i}] has an empty {'prompt' if sample.token_ids else 'completion'}")
    lengths = [input_length(s) for s in samples]
    starts = [0, *accumulate(lengths)]
    tokens = [t for s in samples for t in (*s.prompt_ids, *s.token_ids[:-1])]
    rows = [
        row
        for start, s in zip(starts, samples, strict=False)
        for row in range(start + len(s.prompt_ids) - 1, start + input_length(s))
    ]

    def on_device(values: Sequence[int] | Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    return PackedBatch(
        input_ids=on_device(tokens, torch.long).unsqueeze(0),
        position_ids=on_device([p for n in lengths for p in range(n)], torch.long).unsqueeze(0),
        token_bounds=tuple(starts),
        rows=on_device(rows, torch.long),
        labels=on_device([t for s in samples for t in s.token_ids], torch.long),
        sampler_logps=on_device([lp for s in samples for lp in s.logprobs], torch.float32),
        row_bounds=(0, *accumulate(len(s.token_ids) for s in samples)),
    )


def micro_batches(units: Iterable[tuple[Unit, Sequence[Sample]]], limit: int) -> Iterator[list[Unit]]:
    """Splits units (a pair, a group member) into runs of at most `limit` tokens; a larger unit stands alone."""
    batch: list[Unit] = []
    used = 0
    for unit, samples in units:
        size = sum(input_length(s) for s in samples)
        if batch and used + size > limit:
            yield batch
            batch, used = [], 0
        batch.append(unit)
        used += size
    if batch:
        yield batch
