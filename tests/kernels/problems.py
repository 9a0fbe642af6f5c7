"""Small random problems shared by the kernel tests; everything is seeded."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class HeadProblem(NamedTuple):
    """Hidden states, head and labels of a few sequences; leaves that require gradients."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor  # (V,)
    labels: Tensor  # (N,)
    bounds: list[int]  # 2P + 1
    ref_logps: Tensor  # (2P,)

    def to(self, dtype: torch.dtype) -> HeadProblem:
        """A copy whose leaves have another dtype; labels, bounds stay."""
        return HeadProblem(
            self.hidden.detach().to(dtype).requires_grad_(),
            self.weight.detach().to(dtype).requires_grad_(),
            self.bias.detach().to(dtype).requires_grad_(),
            self.labels,
            self.bounds,
            self.ref_logps.to(torch.float64 if dtype == torch.float64 else torch.float32),
        )


def head_problem(
    lengths: list[int], vocab: int = 37, width: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64
) -> HeadProblem:
    """`lengths` holds the token counts of the 2P sequences; the reference lies close to the policy, as in training."""
    g = torch.Generator().manual_seed(seed)
    rows = sum(lengths)
    hidden = torch.randn(rows, width, generator=g, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=g, dtype=torch.float64) * 0.7
    bias = torch.randn(vocab, generator=g, dtype=torch.float64) * 0.5
    labels = torch.randint(0, vocab, (rows,), generator=g)
    bounds = [0]
    for n in lengths:
        bounds.append(bounds[-1] + n)
    tokens = torch.log_softmax(hidden @ weight.t(), dim=1).gather(1, labels[:, None])[:, 0]
    sums = torch.stack([tokens[a:b].sum() for a, b in pairwise(bounds)]) if lengths else tokens[:0]
    ref = sums + torch.randn(sums.shape, generator=g, dtype=torch.float64)
    return HeadProblem(hidden, weight, bias, labels, bounds, ref).to(dtype)


def grads_of(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    """Gradients of a scalar, by torch.autograd.grad."""
    return list(torch.autograd.grad(loss, leaves))
