"""Attention over packed spans by torch's own SDPA: padded inside attention only, in buckets of like lengths.

Queries, keys and values of a bucket are spread into one row a span; a span's keys are its prefix and then its own.
There is no mask over tokens x tokens, whose cost is quadratic in the batch: the cost is linear in the spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from advgame.learn.packing import Span, to_device

FREE_CELLS = 1 << 16
"""Scores (query, key) that padding may always add to a bucket: below that a call of its own costs more."""


@dataclass(frozen=True)
class Bucket:
    """Spans of about one length. Cells of queries and keys hold packed token indices, 0 in the padding."""

    spans: int
    queries: Tensor  # (spans * longest query,)
    keys: Tensor  # (spans * longest key,)
    shared: Tensor | None  # (spans, 1, 1, 1) prefix lengths; None: no span has a prefix

    def visible(self, window: int | None) -> Tensor | None:
        """(spans or 1, 1, longest query, longest key) of bool, or None where plain causal attention says it all.

        Key j of a span stands at position j, query i at `shared` + i; padded keys come after every real query.
        """
        rows, columns = len(self.queries) // self.spans, len(self.keys) // self.spans
        window = window if window is not None and window < columns else None
        if self.shared is None and window is None:
            return None
        device = self.queries.device
        at = torch.arange(rows, device=device).unsqueeze(1)
        if self.shared is not None:
            at = at + self.shared
        distance = at - torch.arange(columns, device=device)
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        return seen if seen.dim() == 4 else seen[None, None]


class SdpaLayout:
    """How a batch's spans lie in buckets."""

    def __init__(self, spans: Sequence[Span], device: torch.device):
        self.buckets: list[Bucket] = []
        cells = torch.empty(sum(s.length for s in spans), dtype=torch.long)
        offset = 0
        for members in buckets_of(spans):
            rows, columns = max(s.length for s in members), max(s.shared + s.length for s in members)
            start, length, prefix, shared = (torch.tensor(x).unsqueeze(1) for x in zip(*members, strict=True))
            query, key = torch.arange(rows), torch.arange(columns)
            inside = query < length
            queries = torch.where(inside, start + query, 0)
            own = torch.where(key < shared + length, start + key - shared, 0)
            keys = torch.where(key < shared, prefix + key, own)
            where = torch.arange(len(members)).unsqueeze(1) * rows + query + offset
            cells[queries[inside]] = where[inside]
            offset += len(members) * rows
            self.buckets.append(
                Bucket(
                    len(members),
                    to_device(queries.flatten(), device),
                    to_device(keys.flatten(), device),
                    to_device(shared.view(-1, 1, 1, 1), device) if any(s.shared for s in members) else None,
                )
            )
        self.cells = to_device(cells, device)  # (tokens,): where each token's output lies
        self._masks: dict[int | None, list[Tensor | None]] = {}  # layers with the same window share theirs

    def attend(
        self,
        query: Tensor,  # (tokens, heads, head_dim)
        key: Tensor,  # (tokens, kv_heads, head_dim)
        value: Tensor,  # (tokens, kv_heads, head_dim)
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:  # (tokens, heads, head_dim)
        if window not in self._masks:
            self._masks[window] = [bucket.visible(window) for bucket in self.buckets]
        outputs = []
        for bucket, mask in zip(self.buckets, self._masks[window], strict=True):
            q = _spread(query, bucket.queries, bucket.spans)
            k, v = (_spread(x, bucket.keys, bucket.spans) for x in (key, value))
            if softcap is None:
                gqa = q.shape[1] != k.shape[1]
                out = F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=gqa
                )
            else:
                out = _softcapped(q, k, v, scaling, mask, softcap)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return joined.index_select(0, self.cells)


def buckets_of(spans: Sequence[Span]) -> list[list[Span]]:
    """Longest first; a bucket takes in shorter spans until padding doubles its scores. Prefixes go by themselves."""
    buckets: list[list[Span]] = []
    for some in ([s for s in spans if not s.shared], [s for s in spans if s.shared]):
        used = 0
        current: list[Span] = []
        for span in sorted(some, key=lambda s: (-s.length, -s.shared)):
            used += span.length * (span.shared + span.length)
            rows, columns = current[0].length if current else 0, max((s.shared + s.length for s in current), default=0)
            padded = (len(current) + 1) * rows * max(columns, span.shared + span.length)
            if current and padded > 2 * used + FREE_CELLS:
                buckets.append(current)
                used, current = span.length * (span.shared + span.length), []
            current.append(span)
        if current:
            buckets.append(current)
    return buckets


def _spread(x: Tensor, cells: Tensor, spans: int) -> Tensor:  # -> (spans, heads, longest, head_dim)
    return x.index_select(0, cells).unflatten(0, (spans, -1)).transpose(1, 2)


def _softcapped(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, mask: Tensor | None, softcap: float) -> Tensor:
    """What SDPA has no name for: scores bounded by softcap * tanh(scores / softcap) (Gemma 2)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~mask, -torch.inf).float().softmax(-1).to(v.dtype) @ v
