"""Attention over packed spans by torch's FlexAttention: one kernel over the whole pack, empty blocks left out.

The mask is a function of two tokens' (family, branch, position); which blocks it touches follows from the spans on
the host, so that nothing of tokens x tokens is ever made. Forward runs anywhere; backward needs a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from advgame.learn.packing import Span, to_device

BLOCK = 128
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_compiled: Callable[..., Tensor] | None = None


def _flex(device: torch.device) -> Callable[..., Tensor]:
    """Compiled on a GPU, where the eager form would hold all scores; as it is elsewhere."""
    global _compiled
    if device.type != "cuda":
        return flex_attention
    if _compiled is None:
        _compiled = torch.compile(flex_attention)
    return _compiled


class FlexLayout:
    """Family (which prompt), branch (0: the prompt itself) and position of each token, and the blocks in use."""

    def __init__(self, spans: Sequence[Span], device: torch.device):
        self.tokens = sum(s.length for s in spans)
        ordered = sorted(spans)
        described = torch.empty(3, self.tokens, dtype=torch.int32)
        for number, s in enumerate(ordered):
            run = slice(s.start, s.start + s.length)
            described[0, run] = s.prefix if s.shared else s.start
            described[1, run] = number + 1 if s.shared else 0
            described[2, run] = torch.arange(s.shared, s.shared + s.length, dtype=torch.int32)
        self.family, self.branch, self.position = to_device(described, device)
        self._blocks = touched_blocks(ordered, self.tokens)
        self._device = device
        self._masks: dict[int | None, BlockMask] = {}

    def visible(self, window: int | None) -> MaskMod:
        """Whether query token q sees key token k: the same prompt, its trunk or its own branch, not later, within
        the window."""
        family, branch, position = self.family, self.branch, self.position

        def seen(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            trunk_or_own = (branch[k] == 0) | (branch[k] == branch[q])
            distance = position[q] - position[k]
            inside = (family[q] == family[k]) & trunk_or_own & (distance >= 0)
            return inside if window is None else inside & (distance < window)

        return seen

    def block_mask(self, window: int | None) -> BlockMask:
        """The blocks that hold a visible score, as FlexAttention wants them; the mask function cuts inside them."""
        if window not in self._masks:
            count = self._blocks.sum(-1, dtype=torch.int32)
            # indices of the touched blocks first, in order; the rest is never read
            order = self._blocks.int().argsort(dim=-1, descending=True, stable=True).int()
            counts, orders = (to_device(x[None, None], self._device) for x in (count, order))
            self._masks[window] = BlockMask.from_kv_blocks(
                counts,
                orders,
                BLOCK_SIZE=BLOCK,
                mask_mod=self.visible(window),
                seq_lengths=(self.tokens, self.tokens),
            )
        return self._masks[window]

    def attend(
        self,
        query: Tensor,  # (tokens, heads, head_dim)
        key: Tensor,  # (tokens, kv_heads, head_dim)
        value: Tensor,  # (tokens, kv_heads, head_dim)
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:  # (tokens, heads, head_dim)
        score_mod = None
        if softcap is not None:

            def score_mod(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
                return softcap * torch.tanh(score / softcap)

        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        out = _flex(query.device)(
            q, k, v, score_mod=score_mod, block_mask=self.block_mask(window), scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return out[0].transpose(0, 1)


def touched_blocks(spans: Sequence[Span], tokens: int) -> Tensor:  # (blocks, blocks) bool: query block, key block
    """Blocks of scores in which some query may see some key (windows left aside). Linear in the spans."""
    blocks = -(-tokens // BLOCK)
    touched = torch.zeros(blocks, blocks, dtype=torch.bool)
    for s in spans:
        first, last = s.start // BLOCK, (s.start + s.length - 1) // BLOCK + 1
        touched[first:last, first:last] |= torch.ones(last - first, last - first, dtype=torch.bool).tril()
        if s.shared:
            touched[first:last, s.prefix // BLOCK : (s.prefix + s.shared - 1) // BLOCK + 1] = True
    return touched
