"""DPO in a plain PyTorch loop: hidden states in, loss out, logits never whole in memory.

    python examples/plain_loop.py

trains a small recurrent model on one preference, that upward runs are better than downward ones, for 60 steps on
the CPU (or a GPU if there is one), and prints loss and accuracy. The reference is the model's own average.
"""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from advgame_kernels import ema_update_, linear_logprobs, linear_preference_loss
from torch import Tensor, nn

VOCAB, WIDTH, PAIRS, LENGTH = 32, 48, 16, 6
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Model(nn.Module):
    """Any network that gives hidden states, and an LM head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.body = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def hidden(self, tokens: Tensor) -> Tensor:  # (B, L) -> (B, L, H)
        return self.body(self.embedding(tokens))[0]


def batch(generator: torch.Generator) -> Tensor:  # (2 · PAIRS, 1 + LENGTH): chosen and rejected side by side
    start = torch.randint(LENGTH, VOCAB - LENGTH, (PAIRS, 1), generator=generator)
    run = torch.arange(LENGTH + 1)
    return torch.stack([start + run, start - run], dim=1).flatten(0, 1).to(DEVICE)


def response_rows(model: Model, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states that predict response tokens, (N, H), and those tokens, (N,); the prompt is the first token."""
    return model.hidden(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()


def main(steps: int = 60) -> list[float]:
    """Train, print every tenth step, and return the losses."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Model().to(DEVICE)
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    bounds = list(range(0, 2 * PAIRS * LENGTH + 1, LENGTH))  # where sequences begin and end, on the host
    losses = []
    for step in range(steps):
        tokens = batch(generator)
        with torch.no_grad():
            rows, labels = response_rows(reference, tokens)
            logps = linear_logprobs(rows, reference.lm_head.weight, labels).logps
            ref_logps = torch.stack([logps[a:b].sum() for a, b in pairwise(bounds)])
        rows, labels = response_rows(model, tokens)
        out = linear_preference_loss(rows, model.lm_head.weight, labels, bounds, ref_logps, beta=0.1)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        ema_update_(list(reference.parameters()), list(model.parameters()), decay=0.95)
        losses.append(out.loss.item())
        if step % 10 == 9:
            print(f"step {step + 1:3}  loss {losses[-1]:.4f}  accuracy {out.accuracies.mean():.2f}")
    return losses


if __name__ == "__main__":
    main()
