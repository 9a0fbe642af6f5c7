"""How far margins are from float64 in bfloat16: eager code, bfloat16 logits, float32 logits.

The reference lies close to the policy, as it does with an exponential moving average: the margin is then a small
difference of large sums, and rounding in the logits goes straight into it. Both sides are computed the same way,
so what is common to both cancels as it does in training.
"""

from __future__ import annotations

from itertools import pairwise

import advgame_kernels as ak
import torch
from torch import Tensor

PAIRS, TOKENS, WIDTH, VOCAB, STEP = 16, 64, 256, 8192, 1e-3


def _sums(tokens: Tensor, bounds: list[int]) -> Tensor:
    return torch.stack([tokens[a:b].double().sum() for a, b in pairwise(bounds)])


def margin_errors(device: torch.device) -> dict[str, float]:
    """Root mean square error of h, in nats, over 16 pairs of 64-token responses; printed and returned."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * PAIRS * TOKENS, WIDTH, generator=g) * 2
    nudge = torch.randn(hidden.shape, generator=g) * STEP * 20
    weight = (torch.randn(VOCAB, WIDTH, generator=g) / WIDTH**0.5).to(device, torch.bfloat16)
    policy, reference = (x.to(device, torch.bfloat16) for x in (hidden + nudge, hidden))
    # Labels drawn from the model itself: log-probs of plausible tokens, not of the tail.
    noise = -torch.empty(hidden.shape[0], VOCAB).exponential_(generator=g).log().to(device)
    labels = (reference.float() @ weight.float().t() + noise).argmax(dim=1)
    bounds = list(range(0, hidden.shape[0] + 1, TOKENS))

    def margins(tokens_of) -> Tensor:
        ratio = (_sums(tokens_of(policy), bounds) - _sums(tokens_of(reference), bounds)).view(-1, 2)
        return ratio[:, 0] - ratio[:, 1]

    def eager(x: Tensor) -> Tensor:
        return torch.log_softmax((x @ weight.t()).float(), dim=1).gather(1, labels[:, None])[:, 0]

    with torch.no_grad():
        exact = margins(lambda x: ak.linear_logprobs_ref(x.double(), weight.double(), labels).logps)
        errors = {
            "eager, bfloat16 logits": margins(eager),
            "ours, bfloat16 logits": margins(
                lambda x: ak.linear_logprobs(x, weight, labels, logits_dtype=torch.bfloat16).logps
            ),
            "ours, float32 logits (default)": margins(lambda x: ak.linear_logprobs(x, weight, labels).logps),
        }
    size = exact.square().mean().sqrt()
    print(f"\nmargin error against float64: {PAIRS} pairs, {TOKENS} tokens, margins of {size:.3f} nats")
    result = {name: (m - exact).square().mean().sqrt().item() for name, m in errors.items()}
    for name, error in result.items():
        print(f"  {name:34}{error:12.2e} nats rms")
    return result
