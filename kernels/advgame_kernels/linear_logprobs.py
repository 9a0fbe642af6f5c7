"""Log-probability of a label, entropy and log-sum-exp from hidden states and an LM head."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from advgame_kernels._twins import pick, twin_of
from advgame_kernels.head import (
    Head,
    HeadOptions,
    Workspace,
    largest_chunk,
    make_grads,
    make_head,
    push_grads,
    row_chunks,
    stats_of,
)
from advgame_kernels.types import LogProbs
from advgame_kernels.vocab_parallel import whole_vocabulary


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: Head
    ) -> tuple[Tensor, ...]:
        dtypes = (head.stats_dtype, head.stats_dtype, torch.float64)
        out = LogProbs(*(hidden.new_empty(hidden.shape[0], dtype=dtype) for dtype in dtypes))
        work = Workspace(head, largest_chunk([hidden.shape[0]], head.row_budget))
        for rows in row_chunks(0, hidden.shape[0], head.row_budget):
            stats = stats_of(head, work.logits(hidden[rows]), labels[rows])
            for whole, part in zip(out, stats, strict=True):
                whole[rows] = part
        # The backward pass reads the head's own aliases: ZeRO-3 empties the parameters between the passes. Saving the
        # parameters as well lets autograd notice an optimiser step that comes too early.
        ctx.save_for_backward(hidden, weight, bias, labels, *out)
        ctx.head, ctx.dtypes = head, (weight.dtype, None if bias is None else bias.dtype)
        ctx.set_materialize_grads(False)
        return out.logps, out.entropy, out.lse.to(head.stats_dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        hidden, _, _, labels, *stats = ctx.saved_tensors
        if all(g is None for g in upstream):
            return None, None, None, None, None
        head: Head = ctx.head
        weight, bias = head.weight, head.bias
        need = ctx.needs_input_grad
        with torch.enable_grad():
            grads = make_grads(
                hidden.detach().requires_grad_(need[0]),
                weight.detach().requires_grad_(need[1]),
                None if bias is None else bias.detach().requires_grad_(need[2]),
            )
        ups = [None if g is None else g.to(head.stats_dtype).contiguous() for g in upstream]
        work = Workspace(head, largest_chunk([hidden.shape[0]], head.row_budget))
        for rows in row_chunks(0, hidden.shape[0], head.row_budget):
            part = LogProbs(*(s[rows] for s in stats))
            d_logps, d_entropy, d_lse = (None if g is None else g[rows] for g in ups)
            h = hidden.detach()[rows]
            push_grads(head, grads, work, rows, h, labels[rows], work.logits(h), part, d_logps, d_entropy, d_lse)
        grads.finish(head.shard)
        return (
            grads.hidden,
            None if grads.weight is None else grads.weight.to(ctx.dtypes[0]),
            None if grads.bias is None else grads.bias.to(ctx.dtypes[1]),
            None,
            None,
        )


def linear_logprobs(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H) dtype of hidden, or float32 beside half precision
    labels: Tensor,  # (N,) int64 in [0, V)
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float = 0.0,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    impl: str = "auto",
    process_group: dist.ProcessGroup | None = None,
) -> LogProbs:
    """log softmax(softcap·tanh((hidden @ weight.T + bias)/softcap) / temperature) at the labels, entropy, log-sum-exp.

    All three outputs, (N,) float32 (float64 for float64 inputs) in nats, are differentiable with respect to
    hidden, weight and bias. At most `chunk_bytes` of logits exist at once (None: 192 MiB on the CPU, 1 GiB on a
    GPU), in `logits_dtype` (None: float32, or float64). Since gradients of arbitrary outputs are known only in
    the backward pass, that recomputes the logits: four GEMMs; `linear_preference_loss` and `linear_policy_loss`
    need three. The gradient of the weight accumulates in float32 and is not computed for a frozen weight; that of
    a float32 master weight beside half-precision hidden states stays in float32.

    With `process_group` the weight (and bias) is this rank's equal share of the vocabulary rows, in rank order,
    hidden and labels are the same on all ranks, and so are the outputs and the gradient of hidden.

    Raises ValueError for a wrong shape, dtype, device, setting or (on the CPU) a label out of range.
    """
    options = HeadOptions(bias, softcap, temperature, chunk_bytes, logits_dtype, impl, process_group)
    head = make_head(hidden, weight, labels, options)
    return LogProbs(*_LinearLogProbs.apply(hidden.contiguous(), weight, bias, labels, head))


@twin_of(linear_logprobs)
def linear_logprobs_ref(hidden: Tensor, weight: Tensor, labels: Tensor, **settings: Any) -> LogProbs:
    """`linear_logprobs` with all logits in memory and torch's autograd, in one matrix product of the head's dtype.

    Takes the same keywords. `process_group` is honoured by gathering the shards; `chunk_bytes`, `logits_dtype` and
    `impl` say how the other one computes and are ignored.
    """
    return whole_logprobs(hidden, weight, labels, pick(HeadOptions, settings))


def whole_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, options: HeadOptions) -> LogProbs:
    """Log-probs, entropy and lse of the rows from whole logits, for all the references."""
    logits = hidden @ whole_vocabulary(weight, options.process_group).to(hidden.dtype).t()
    if options.bias is not None:
        logits = logits + whole_vocabulary(options.bias, options.process_group)
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if options.softcap > 0.0:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    logits = logits / options.temperature
    log_probs = torch.log_softmax(logits, dim=1)
    entropy = -torch.where(log_probs > float("-inf"), log_probs.exp() * log_probs, 0.0).sum(dim=1)
    return LogProbs(log_probs.gather(1, labels[:, None])[:, 0], entropy, torch.logsumexp(logits, dim=1))
