"""The two passes over a chunk of logits, in plain torch: the reference of the C++ and Triton passes.

Notation: z raw logits, x = softcap·tanh(z/softcap)/T (or z/T), m = max x, s = Σ exp(x−m).
lse = m + log s;  logp = x_label − lse;  entropy H = log s − Σ exp(x−m)(x−m)/s.
lse is float64: far from zero a float32 one would put its rounding into every probability of the backward pass.
With upstream gradients a, b, c of logp, H and lse:  ∂x_j = a·[j=label] + p_j·(c − a − b·(x_j − lse + H)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from advgame_kernels.types import LogProbs


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 stays float64; every other dtype is computed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def transform(logits: Tensor, temperature: float, softcap: float) -> Tensor:
    """x from z, always a fresh tensor or an untouched view of `logits`."""
    x = logits.to(compute_dtype(logits))
    if softcap > 0.0:
        x = softcap * torch.tanh(x / softcap)
    return x if temperature == 1.0 else x / temperature


def row_stats(
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    temperature: float = 1.0,
    softcap: float = 0.0,
) -> LogProbs:
    """Log-probability of the label, entropy and log-sum-exp of every row."""
    x = transform(logits, temperature, softcap)
    if x.shape[0] == 0:
        empty = x.new_zeros(0)
        return LogProbs(empty, empty.clone(), empty.double())
    peak = x.amax(dim=1)
    peak = torch.where(peak > float("-inf"), peak, 0.0)  # nothing but -inf: an lse of -inf, not NaN
    x = x - peak[:, None]
    exps = x.exp()
    total = exps.sum(dim=1)
    log_total = total.log()
    # A logit of -inf has probability 0 and adds nothing to the entropy; 0 * -inf would be NaN.
    weighted = torch.where(exps > 0, exps * x, 0.0).sum(dim=1)
    # (x_label - m) - log s keeps the digits that x_label - lse loses when every logit is far from zero.
    logps = x.gather(1, labels[:, None])[:, 0] - log_total
    return LogProbs(logps, log_total - weighted / total, peak.double() + total.double().log())


def row_grads_(
    logits: Tensor,  # (N, V), may be overwritten
    labels: Tensor,  # (N,), −1 for a label outside these columns
    stats: LogProbs,
    d_logps: Tensor | None,  # (N,) upstream gradient of logps
    d_entropy: Tensor | None,  # (N,)
    d_lse: Tensor | None,  # (N,)
    temperature: float = 1.0,
    softcap: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # (N, V) in out_dtype (default: the logits' dtype)
    """Gradient with respect to the raw logits; takes their memory when the dtype allows it."""
    x = transform(logits, temperature, softcap)
    high = stats.lse.to(x.dtype)
    logprobs = x - high[:, None]
    if x.dtype != torch.float64:
        logprobs -= (stats.lse - high).to(x.dtype)[:, None]
    probs = logprobs.exp()
    factor = torch.zeros_like(high)
    if d_lse is not None:
        factor = factor + d_lse
    if d_logps is not None:
        factor = factor - d_logps
    grad = probs * factor[:, None]
    if d_entropy is not None:
        pull = torch.where(probs > 0, probs * (logprobs + stats.entropy[:, None]), 0.0)
        grad -= d_entropy[:, None] * pull
    if d_logps is not None:
        own = labels >= 0  # a label of −1 is one that another rank's part of the vocabulary holds
        share = torch.where(own, d_logps, 0.0).to(grad.dtype)
        grad.scatter_add_(1, labels.clamp(min=0)[:, None], share[:, None])
    if temperature != 1.0:
        grad /= temperature
    if softcap > 0.0:
        grad *= 1.0 - torch.tanh(logits.to(grad.dtype) / softcap).square()
    out_dtype = out_dtype or logits.dtype
    if out_dtype != logits.dtype:
        return grad.to(out_dtype)
    return logits.copy_(grad)
