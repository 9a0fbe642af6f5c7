"""Log-probability of a label, entropy and log-sum-exp from logits that already exist."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from advgame_kernels import passes, passes_torch
from advgame_kernels._checks import floating, label_ids, positive, refuse
from advgame_kernels.types import LogProbs


def selective_logprobs_ref(
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,) int64
    *,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    impl: str = "auto",
) -> LogProbs:
    """The same as `selective_logprobs` written with torch's own log_softmax and autograd; keeps (N, V) copies."""
    x = logits.to(passes_torch.compute_dtype(logits)) / temperature
    log_probs = torch.log_softmax(x, dim=1)
    probs = log_probs.exp()
    entropy = -torch.where(probs > 0, probs * log_probs, 0.0).sum(dim=1)
    return LogProbs(log_probs.gather(1, labels[:, None])[:, 0], entropy, torch.logsumexp(x, dim=1))


class _SelectiveLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, temperature: float, inplace: bool, impl: str) -> Any:
        stats = passes.row_stats(logits, labels, temperature, 0.0, impl)
        ctx.save_for_backward(logits, labels, *stats)
        ctx.temperature, ctx.inplace, ctx.impl, ctx.spent = temperature, inplace, impl, False
        ctx.set_materialize_grads(False)
        return stats.logps, stats.entropy, stats.lse.to(stats.logps.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_logps: Tensor | None, d_entropy: Tensor | None, d_lse: Tensor | None) -> Any:
        if ctx.spent:
            raise RuntimeError("selective_logprobs: inplace_backward=True allows one backward pass through the graph")
        logits, labels, *stats = ctx.saved_tensors
        if d_logps is None and d_entropy is None and d_lse is None:
            return None, None, None, None, None
        if ctx.inplace:
            ctx.spent = True
        ups = (None if g is None else g.to(stats[0].dtype).contiguous() for g in (d_logps, d_entropy, d_lse))
        a, b, c = ups
        with torch.no_grad():
            own, room = (logits.detach(), None) if ctx.inplace else passes.beside(logits.detach(), ctx.impl)
            dlogits = passes.row_grads_(
                own, labels, LogProbs(*stats), a, b, c, ctx.temperature, 0.0, logits.dtype, ctx.impl, room
            )
        return dlogits, None, None, None, None


def selective_logprobs(
    logits: Tensor,  # (N, V) any float dtype, unit stride in V
    labels: Tensor,  # (N,) int64 in [0, V)
    *,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    impl: str = "auto",
) -> LogProbs:
    """log softmax(logits / temperature) at the labels, with entropy and log-sum-exp, in one read of the logits.

    All three outputs, (N,) float32 (float64 for float64 logits) in nats, are differentiable. The backward pass
    is one read and one write of (N, V). With `inplace_backward` the gradient takes the memory of `logits`: nothing
    else may need them afterwards, and a second backward pass through the same graph raises RuntimeError.

    Raises ValueError for a wrong shape, dtype, device, stride or temperature; labels out of range raise on the CPU
    and trip a device assertion on a GPU, where checking them would cost a host sync.
    """
    floating("logits", logits, 2)
    if logits.shape[1] == 0:
        refuse("logits", "at least one column", tuple(logits.shape))
    if logits.shape[0] > 0 and logits.stride(1) != 1:
        refuse("logits", "unit stride in the vocabulary dimension", f"stride {logits.stride()}")
    if inplace_backward and logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]:
        refuse("logits", "rows that do not overlap, for inplace_backward writes over them", f"stride {logits.stride()}")
    label_ids(labels, logits.shape[0], logits.shape[1], logits.device)
    positive("temperature", temperature)
    chosen = passes.choose(impl, logits.dtype, logits.device)
    return LogProbs(*_SelectiveLogProbs.apply(logits, labels, temperature, inplace_backward, chosen))
