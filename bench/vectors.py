"""preference_loss and policy_loss on log-probs that exist: vectors, bound by launches and by a few reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import advgame_kernels as ak
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.floors import Bandwidth
from bench.logits import running
from bench.timing import alternate, table

SEQUENCES, TOKENS, BETA, KL_BETA = 1 << 16, 1 << 20, 0.1, 0.04


def dpo(logps: Tensor, ref: Tensor) -> Tensor:
    """DPO in float32, as plain code writes it."""
    h = (logps[0::2] - ref[0::2]) - (logps[1::2] - ref[1::2])
    return -F.logsigmoid(BETA * h).mean()


def grpo(logps: Tensor, advantages: Tensor, weights: Tensor, ref: Tensor) -> Tensor:
    """GRPO on policy with the k3 penalty in float32, as plain code writes it."""
    gap = ref - logps
    ratio = torch.exp(logps - logps.detach())
    return (weights * (KL_BETA * (torch.exp(gap) - gap - 1.0) - ratio * advantages)).sum()


def bench_vectors(device: torch.device, repeats: int, memory: Bandwidth) -> dict[str, Any]:
    """Both losses forward and backward, with a floor of reading each input and writing the gradient once."""
    result = {}
    logps = (-100 * torch.rand(SEQUENCES, device=device)).requires_grad_()
    tokens = (-3 * torch.rand(TOKENS, device=device)).requires_grad_()
    ref, near = logps.detach() - 1.0, tokens.detach() - 0.1
    weights, advantages = torch.full_like(near, 1.0 / TOKENS), torch.randn_like(near)
    rest = (advantages, weights, near)
    fast_dpo, fast_grpo = torch.compile(dpo), torch.compile(grpo)
    works: dict[str, tuple[Tensor, int, dict[str, Callable[[], Tensor]]]] = {
        f"preference_loss: {SEQUENCES} sequences": (logps, 12 * SEQUENCES, {
            "ours": lambda: ak.preference_loss(logps, ref, beta=BETA).loss,
            "eager torch, float32": lambda: dpo(logps, ref),
            "eager torch, torch.compile": lambda: fast_dpo(logps, ref),
        }),
        f"policy_loss: {TOKENS} tokens": (tokens, 20 * TOKENS, {
            "ours": lambda: ak.policy_loss(tokens, advantages, weights, ref_logps=near, kl_beta=KL_BETA).loss,
            "eager torch, float32": lambda: grpo(tokens, *rest),
            "eager torch, torch.compile": lambda: fast_grpo(tokens, *rest),
        }),
    }  # fmt: skip
    for name, (leaf, size, losses) in works.items():
        floor = size / memory.best * 1e3
        print(f"\n{name}, float64 inside ours\n  floor: {size / 1e6:.1f} MB, {floor:.3f} ms")
        left_out: dict[str, str] = {}
        runs = {k: lambda loss=loss, leaf=leaf: torch.autograd.grad(loss(), leaf) for k, loss in losses.items()}
        timings = alternate(running(runs, left_out), device, repeats, warm=True)
        print(table("  forward and backward", timings, floor))
        result[name] = {
            "floor_ms": floor, "timings": {k: asdict(v) for k, v in timings.items()}, "left_out": left_out,
        }  # fmt: skip
    return result
