"""Attention over packed spans, plugged into any Hugging Face decoder through its attention interface.

Everything outside attention runs on the packed tokens; inside, one of three backends (`spans_sdpa`, `spans_flex`,
`spans_flash`) lets each span attend to its prefix and itself. A trial at the start shows, for the very model that
is about to train, that this computes what each sequence computes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from advgame.errors import InputError
from advgame.game.tree import Sample
from advgame.learn.packing import PackedBatch, Span, pack
from advgame.learn.spans_flash import FlashLayout, find_varlen
from advgame.learn.spans_flex import FlexLayout
from advgame.learn.spans_sdpa import SdpaLayout

NAME = "advgame_packed"
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest gap of a trial, as a share of the hidden states' size."""


class Layout(Protocol):
    """A batch's spans as one backend wants them."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor: ...


LayoutOf = Callable[[Sequence[Span], torch.device], Layout]


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> LayoutOf:
    """The backend that `learn.attention` names; `auto`: SDPA on a CPU, else flash-attention where it runs, else flex.

    InputError where the machine lacks what was asked for.
    """
    gpu, half = device.type == "cuda", dtype != torch.float32
    if name == "auto":
        if not gpu:
            return SdpaLayout
        varlen = find_varlen(builds=False) if half else None
        return FlexLayout if varlen is None else _flash(varlen)
    if name == "sdpa":
        return SdpaLayout
    if name == "flex":
        if not gpu:
            raise InputError("learn.attention: flex has no backward pass on a CPU; use sdpa")
        return FlexLayout
    if not gpu or not half:
        raise InputError("learn.attention: flash needs a GPU and learn.dtype: bfloat16; use auto")
    varlen = find_varlen(builds=True)
    if varlen is None:
        raise InputError("learn.attention: no flash-attention for this machine; pip install flash-attn, or use auto")
    return _flash(varlen)


def _flash(varlen: Callable[..., Any]) -> LayoutOf:
    return lambda spans, device: FlashLayout(spans, device, varlen)


@torch.compiler.disable  # spans differ from batch to batch: around attention all shapes are (tokens, ...)
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
    """Attention within the spans of `layout`; returns (1, tokens, heads, head_dim)."""
    if dropout:
        raise ValueError("packed attention has no dropout; set the model's attention_dropout to 0")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return layout.attend(q, k, v, scaling, sliding_window, softcap).unsqueeze(0), None


AttentionInterface.register(NAME, packed_attention)


def use_packed_attention(
    model: PreTrainedModel,
    field: str,
    layout_of: LayoutOf = SdpaLayout,
    dtype: torch.dtype = torch.float32,
) -> str | None:
    """Switches `model` to packed attention, after trials on short sequences.

    Returns None if prompts can be shared, else a line that says why they cannot. InputError if the architecture
    has no attention interface, or if packed sequences do not compute what each computes alone: attention sinks,
    convolutions and other state across tokens would leak or be lost in silence.
    """
    name = type(model).__name__
    refusal = f"{field}: {name} cannot be trained on packed sequences"
    if not getattr(model, "_supports_attention_backend", False):
        raise InputError(f"{refusal}: it does not take an attention backend; use another architecture")
    vocabulary = model.config.get_text_config().vocab_size

    def ids(count: int, salt: int) -> tuple[int, ...]:
        return tuple((i * 7 + salt) % vocabulary for i in range(count))

    def sample(prompt: tuple[int, ...], tokens: tuple[int, ...]) -> Sample:
        return Sample(prompt, tokens, (0.0,) * len(tokens), "stop", 0)

    one, two = ids(5, 3), ids(4, 9)
    samples = [sample(one, ids(6, 1)), sample(two, ids(2, 2)), sample(one, ids(9, 4)), sample(one, ids(1, 5))]
    try:
        with torch.no_grad(), torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            alone = [_alone(model, s) for s in samples]
            model.set_attn_implementation(NAME)
            gap, shared_gap = (
                _gap(model, pack(samples, model.device, share=share), layout_of, torch.cat(alone))
                for share in (False, True)
            )
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"{refusal}: {type(error).__name__}: {error}") from error
    if not gap < TOLERANCE[dtype]:
        raise InputError(f"{refusal}: they differ by {gap:.1e} of their size from each sequence alone")
    if not shared_gap < TOLERANCE[dtype]:
        return f"{field}: {name} cannot share a prompt between completions (they differ by {shared_gap:.1e}); unshared"
    return None


def _alone(model: PreTrainedModel, sample: Sample) -> Tensor:  # (completion, hidden)
    ids = torch.tensor([(*sample.prompt_ids, *sample.token_ids[:-1])], device=model.device)
    hidden: Tensor = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
    return hidden[len(sample.prompt_ids) - 1 :].float()


def _gap(model: PreTrainedModel, batch: PackedBatch, layout_of: LayoutOf, alone: Tensor) -> float:
    packed = packed_hidden(model, batch, layout_of).float()
    return float((packed - alone).abs().max() / alone.abs().max())


def packed_hidden(
    model: PreTrainedModel,
    batch: PackedBatch,
    layout_of: LayoutOf = SdpaLayout,
    decoder: Callable[..., Any] | None = None,
) -> Tensor:  # (rows, hidden)
    """Last hidden states of the rows of `batch`, the LM head left out. `decoder`: a compiled form of the model's."""
    layout = layout_of(batch.spans, batch.input_ids.device)
    run = model.get_decoder() if decoder is None else decoder
    out = run(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, layout=layout)
    hidden: Tensor = out.last_hidden_state[0]
    return hidden.index_select(0, batch.rows)
