"""Other people's implementations of the same losses, where they are installed: functions from tensors to a loss."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

TRL_CHUNK = 32_768  # vocabulary columns a tile, as TRL 1.16's trainers ask for
Tokens = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, labels -> log-probs
Loss = Callable[[Tensor, Tensor, Tensor, list[int], Tensor, float], Tensor]


def dpo(tokens: Tensor, bounds: list[int], ref: Tensor, beta: float) -> Tensor:
    """The sigmoid loss from token log-probs, for everybody who stops there."""
    sums = torch.stack([tokens[a:b].sum() for a, b in pairwise(bounds)])
    h = (sums - ref).view(-1, 2)
    return -F.logsigmoid(beta * (h[:, 0] - h[:, 1])).mean()


def eager_tokens(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Whole logits in the head's dtype, float32 log-softmax: what plain code does."""
    log_probs = torch.log_softmax((hidden @ weight.t()).float(), dim=1)
    return log_probs.gather(1, labels[:, None])[:, 0]


def eager(hidden: Tensor, weight: Tensor, labels: Tensor, bounds: list[int], ref: Tensor, beta: float) -> Tensor:
    """The sigmoid loss on `eager_tokens`."""
    return dpo(eager_tokens(hidden, weight, labels), bounds, ref, beta)


def trl(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """TRL's chunked log-probs (four GEMMs), as its trainers ask for them."""
    chunked = importlib.import_module("trl.kernels.chunked_logprob")
    return chunked.ChunkedLogProbFunction.apply(
        hidden, weight, None, labels, 1.0, TRL_CHUNK, None, 1.0, ("log_probs", "entropy")
    )[0]


def liger(hidden: Tensor, weight: Tensor, labels: Tensor, bounds: list[int], ref: Tensor, beta: float) -> Tensor:
    """Liger's fused linear DPO, without its reference head; padding the packed rows is part of its interface."""
    losses = importlib.import_module("liger_kernel.chunked_loss")
    lengths = [b - a for a, b in pairwise(bounds)]
    order = list(range(0, len(lengths), 2)) + list(range(1, len(lengths), 2))
    longest = max(lengths)
    x = hidden.new_zeros(len(lengths), longest, hidden.shape[1])
    y = labels.new_full((len(lengths), longest), -100)
    for place, i in enumerate(order):
        x[place, : lengths[i]] = hidden[bounds[i] : bounds[i + 1]]
        y[place, : lengths[i]] = labels[bounds[i] : bounds[i + 1]]
    loss = losses.LigerFusedLinearDPOLoss(beta=beta, compiled=hidden.is_cuda, use_ref_model=False)
    return loss(weight, x, y)[0]


def torch_chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch's own chunked linear cross-entropy (2.13), a loss per token: its backward makes the logits again."""
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, labels, reduction="none", options=options).float()


def cut(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Apple's Cut Cross-Entropy, a loss per token."""
    cce = importlib.import_module("cut_cross_entropy")
    return -cce.linear_cross_entropy(hidden, weight, labels, reduction="none").float()


def quack(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """QuACK's cross-entropy kernel on whole logits: its chunked linear form has one reduction for all tokens."""
    kernel = importlib.import_module("quack.cross_entropy")
    return -kernel.cross_entropy(hidden @ weight.t(), labels, reduction="none").float()


@functools.cache
def _compiled() -> Loss:
    return torch.compile(eager)


def compiled(hidden: Tensor, weight: Tensor, labels: Tensor, bounds: list[int], ref: Tensor, beta: float) -> Tensor:
    """`eager` through torch.compile."""
    return _compiled()(hidden, weight, labels, bounds, ref, beta)


def _then_dpo(tokens: Tokens) -> Loss:
    """The sigmoid loss on somebody's token log-probs, as TRL's DPOTrainer puts its own together."""
    return lambda hidden, weight, labels, bounds, ref, beta: dpo(tokens(hidden, weight, labels), bounds, ref, beta)


# All who may be there: those who are not say so when they run.
TOKENS: dict[str, Tokens] = {
    "eager torch": eager_tokens,
    "torch, chunked cross-entropy": torch_chunked,
    "TRL, chunked log-probs": trl,
    "Cut Cross-Entropy": cut,
    "QuACK, whole logits": quack,
}
PEERS: dict[str, Loss] = {
    "eager torch, torch.compile": compiled,
    "Liger, fused linear DPO": liger,
} | {name: _then_dpo(tokens) for name, tokens in TOKENS.items() if name != "eager torch"}
SLOW_ON_CPU = {"torch, chunked cross-entropy": "takes minutes on a CPU, 14 × ours in float32; --slow runs it"}
COMPILED = frozenset({"eager torch, torch.compile"})  # those whose first run at a size is no run
