"""Attention over packed spans by flash-attention's variable-length kernel: one call, no padding, no mask.

A span's keys are its prefix and then its own tokens; the kernel aligns a causal mask to the end of the keys, which
puts queries just where they belong. Needs a GPU and half precision; `varlen` may be any function of that form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from advgame.learn.packing import Span, to_device

Varlen = Callable[..., Any]


def find_varlen(*, builds: bool) -> Varlen | None:
    """flash_attn_varlen_func of flash-attention 3, else of 2, where installed; None: neither is.

    With `builds`, the `kernels` package's ready builds come last; it loads them from its hub when they are not in its
    cache, so that they are taken only where flash-attention was asked for by name.
    """
    for module in ("flash_attn_interface", "flash_attn"):
        if find_spec(module) is not None:
            found: Varlen = import_module(module).flash_attn_varlen_func
            return found
    get_kernel = getattr(import_module("kernels"), "get_kernel", None) if builds and find_spec("kernels") else None
    if get_kernel is None:
        return None
    for build in ("kernels-community/flash-attn3", "kernels-community/flash-attn2"):
        try:
            found = get_kernel(build).flash_attn_varlen_func
        except Exception:  # not built for this machine, or no way to the hub: the library raises all sorts
            continue
        return found
    return None


class FlashLayout:
    """Bounds of each span's queries and keys, as the kernel reads them."""

    def __init__(self, spans: Sequence[Span], device: torch.device, varlen: Varlen):
        ordered = sorted(spans)  # by start: queries stand as they are packed
        self._varlen = varlen
        lengths = [s.length for s in ordered]
        wide = [s.shared + s.length for s in ordered]
        self.longest = (max(lengths), max(wide))
        bounds = torch.tensor([[0, *accumulate(lengths)], [0, *accumulate(wide)]], dtype=torch.int32)
        self.query_bounds, self.key_bounds = to_device(bounds, device)
        self.keys: Tensor | None = None
        if any(s.shared for s in ordered):
            runs = [r for s in ordered for r in ((s.prefix, s.shared), (s.start, s.length))]
            self.keys = to_device(torch.cat([torch.arange(a, a + n) for a, n in runs]), device)

    def attend(
        self,
        query: Tensor,  # (tokens, heads, head_dim)
        key: Tensor,  # (tokens, kv_heads, head_dim)
        value: Tensor,  # (tokens, kv_heads, head_dim)
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:  # (tokens, heads, head_dim)
        if self.keys is not None:
            key, value = key.index_select(0, self.keys), value.index_select(0, self.keys)
        out = self._varlen(
            query, key, value,
            cu_seqlens_q=self.query_bounds, cu_seqlens_k=self.key_bounds,
            max_seqlen_q=self.longest[0], max_seqlen_k=self.longest[1],
            softmax_scale=scaling, causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            softcap=softcap or 0.0,
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out  # flash-attention 3 may return the log-sum-exp too
