"""What the functions return: named tuples of tensors, nothing else."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STATS_DTYPES = (torch.float32, torch.float32, torch.float64)
"""Log-prob, entropy and log-sum-exp of a row as the C++ and Triton passes hand them from one to the other."""


class LogProbs(NamedTuple):
    """Per-row results of a log-softmax, float32 (float64 for float64 inputs)."""

    logps: Tensor  # (N,) log-probability of the label, nats
    entropy: Tensor  # (N,) entropy of the row's distribution, nats
    lse: Tensor  # (N,) log-sum-exp of the (soft-capped, tempered) logits; float64 between the two passes


class PreferenceOutput(NamedTuple):
    """A pairwise loss and what to log with it. Only `loss` carries a gradient."""

    loss: Tensor  # scalar: (sum of losses + optional terms) / normalizer
    losses: Tensor  # (P,) the kind's own loss of each pair, without the optional terms
    logps: Tensor  # (2P,) sequence log-probs: sums, or means where the call or the kind averages
    margins: Tensor  # (P,) h = (logp_c - ref_c) - (logp_r - ref_r), in the units of `logps`
    chosen_rewards: Tensor  # (P,) beta * (logp_c - ref_c)
    rejected_rewards: Tensor  # (P,) beta * (logp_r - ref_r)
    accuracies: Tensor  # (P,) 1.0 where the margin is above zero, else 0.0
    entropy: Tensor | None  # (2P,) mean token entropy of each sequence; None where there are no tokens to see


class PolicyOutput(NamedTuple):
    """A token-level policy loss and what to log with it. Only `loss` carries a gradient."""

    loss: Tensor  # scalar
    logps: Tensor  # (N,)
    kl: Tensor  # (N,) the k3 estimate exp(ref - logp) - (ref - logp) - 1; zeros without ref_logps
    ratio: Tensor  # (N,) exp(logp - old), else exp(logp - sampler), else ones
    clip_fraction: Tensor  # scalar: share of the weighted tokens whose ratio was clipped or truncated
    entropy: Tensor | None  # (N,) token entropy; None where only log-probs were given
