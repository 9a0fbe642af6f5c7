"""An input embedding whose gradient is added to the rows that were read, not to a dense tensor of its own.

PyTorch's backward of an embedding fills a tensor of the whole table's size with zeros, adds a few hundred rows, and
adds the tensor to what is there: with tied weights a second float32 table beside the head's gradient, the highest point
of a step's memory, and three passes over it. Here the rows go into `weight.grad` at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel


class _Rows(torch.autograd.Function):
    """Rows of `weight`, which is no input of the graph: its gradient buffer is written by `backward` itself.

    `anchor`, a scalar that requires a gradient, keeps the function in the graph. Were the weight an input, autograd
    would hold the head's gradient back until this one is known, and `grad` would not exist yet.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, ids: Tensor, table: nn.Embedding) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.table = table
        return functional.embedding(ids, table.weight.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        (ids,), weight, skipped = ctx.saved_tensors, ctx.table.weight, ctx.table.padding_idx
        rows = gradients[0].flatten(0, -2).to(weight.dtype)
        if skipped is not None:
            rows = rows.masked_fill(ids.flatten().eq(skipped).unsqueeze(1), 0.0)
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_add_(0, ids.flatten(), rows)
        return None, None, None


def embed_in_place(model: PreTrainedModel) -> bool:
    """Gives a model's input embedding the backward above; whether it could.

    Only for gradients that `backward` adds up in this process's own `grad`: hooks on the weight see the head's part
    alone, and `torch.autograd.grad` would find nothing. Left as they are: embeddings that are not plain (scaled,
    sparse, with a largest norm), frozen ones.
    """
    table = model.get_input_embeddings()
    if type(table) is not nn.Embedding or not table.weight.requires_grad:
        return False
    if table.max_norm is not None or table.scale_grad_by_freq or table.sparse:
        return False

    def forward(ids: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return functional.embedding(ids, table.weight)
        anchor = torch.zeros((), device=table.weight.device, requires_grad=True)
        rows: Tensor = _Rows.apply(anchor, ids, table)  # type: ignore[no-untyped-call]
        return rows

    table.forward = forward  # type: ignore[method-assign, assignment]
    return True
