"""Attention over packed sequences, plugged into any Hugging Face decoder through its attention interface.

Everything outside attention runs on the packed tokens. Inside, queries, keys and values are spread into one row
a sequence and a plain causal SDPA runs over them: no mask over tokens x tokens, whose cost is quadratic in the
batch, and right padding that a causal row never reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from advgame.errors import InputError

NAME = "advgame_packed"


@dataclass(frozen=True)
class Layout:
    """Where packed tokens lie in the padded (sequences, longest) grid."""

    spread: Tensor  # (sequences, longest): packed token of each cell, 0 in the padding
    gather: Tensor  # (tokens,): cell of each packed token

    @staticmethod
    def of(token_bounds: Sequence[int], device: torch.device) -> Layout:
        bounds = torch.tensor(token_bounds)
        lengths = bounds.diff()
        longest = int(lengths.max())
        column = torch.arange(longest)
        inside = column < lengths.unsqueeze(1)
        spread = torch.where(inside, bounds[:-1].unsqueeze(1) + column, 0)
        gather = inside.flatten().nonzero().squeeze(1)
        return Layout(spread.to(device), gather.to(device))


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # (1, heads, tokens, head_dim)
    key: Tensor,  # (1, kv_heads, tokens, head_dim)
    value: Tensor,  # (1, kv_heads, tokens, head_dim)
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of `layout`; returns (1, tokens, heads, head_dim)."""
    sequences, longest = layout.spread.shape
    if dropout:
        raise ValueError("packed attention has no dropout; set the model's attention_dropout to 0")

    def rows(x: Tensor) -> Tensor:  # -> (sequences, heads, longest, head_dim)
        return x[0].transpose(0, 1)[layout.spread].transpose(1, 2)

    q, k, v = rows(query), rows(key), rows(value)
    window = sliding_window if sliding_window is not None and sliding_window < longest else None
    if window is None and softcap is None:
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
    else:
        out = _eager(q, k, v, scaling, window, softcap)
    flat = out.transpose(1, 2).reshape(sequences * longest, q.shape[1], v.shape[3])
    return flat[layout.gather].unsqueeze(0), None


def _eager(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None, softcap: float | None) -> Tensor:
    """The forms SDPA has no name for: a sliding window, soft-capped scores (Gemma)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(q.shape[2], device=q.device)
    distance = position.unsqueeze(1) - position
    visible = (distance >= 0) & (distance < (window or q.shape[2]))
    return scores.masked_fill(~visible, -torch.inf).float().softmax(-1).to(v.dtype) @ v


AttentionInterface.register(NAME, packed_attention)


def use_packed_attention(model: PreTrainedModel, field: str) -> None:
    """Switches `model` to packed attention, after a trial on three short sequences.

    InputError if its architecture has no attention interface, or if packed sequences do not compute what each
    computes alone: attention sinks, convolutions and other state across tokens would leak or be lost in silence.
    """
    refusal = f"{field}: {type(model).__name__} cannot be trained on packed sequences"
    if not getattr(model, "_supports_attention_backend", False):
        raise InputError(f"{refusal}: it does not take an attention backend; use another architecture")
    device = model.device
    lengths, vocabulary = (5, 9, 3), model.config.get_text_config().vocab_size
    ids = [(torch.arange(n, device=device) * 7 + n) % vocabulary for n in lengths]
    try:
        with torch.no_grad():
            alone = torch.cat([model.get_decoder()(input_ids=i.unsqueeze(0)).last_hidden_state[0] for i in ids])
            model.set_attn_implementation(NAME)
            positions = torch.cat([torch.arange(n, device=device) for n in lengths])
            packed = packed_hidden(model, torch.cat(ids).unsqueeze(0), positions.unsqueeze(0), (0, 5, 14, 17))
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"{refusal}: {type(error).__name__}: {error}") from error
    gap = float((packed - alone).abs().max() / alone.abs().max())
    if not gap < 1e-3:
        raise InputError(f"{refusal}: they differ by {gap:.1e} of their size from each sequence alone")


def packed_hidden(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, token_bounds: Sequence[int]
) -> Tensor:  # (tokens, hidden)
    """Last hidden states of a packed batch, the LM head left out."""
    layout = Layout.of(token_bounds, input_ids.device)
    decoder = model.get_decoder()
    out = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False, layout=layout)
    return out.last_hidden_state[0]
