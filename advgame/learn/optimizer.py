"""The optimiser of a player, and its step with the gradient norm clipped in one pass."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from advgame.config import LearnSettings
from advgame.errors import InputError


def make_optimizer(
    parameters: Iterable[nn.Parameter], settings: LearnSettings, lr: float, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW in one fused kernel, or with moments in 8 bits. InputError where the library for those is missing."""
    how = {"lr": lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **how)  # type: ignore[arg-type]
    if find_spec("bitsandbytes") is None:
        raise InputError("learn.optimizer: adamw8bit needs bitsandbytes; pip install bitsandbytes, or set adamw")
    if device.type != "cuda":
        raise InputError("learn.optimizer: adamw8bit needs a GPU; set adamw")
    made: torch.optim.Optimizer = import_module("bitsandbytes.optim").AdamW8bit(parameters, **how)
    return made


@torch.no_grad()
def clipped_step(optimizer: torch.optim.Optimizer, clip_norm: float) -> Tensor:
    """One step on gradients scaled to a total norm of at most `clip_norm`; clears them, returns the norm before.

    The norm is one read of the gradients and stays on the device; the scale rides along in the fused kernel, so
    the gradients are neither written again nor copied.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    divisor = (norm / clip_norm).clamp(min=1.0)
    if optimizer.defaults.get("fused"):
        optimizer.grad_scale = divisor  # type: ignore[attr-defined]  # what GradScaler sets: gradients are divided by it
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale  # type: ignore[attr-defined]
    else:
        for gradient in gradients:
            gradient.div_(divisor)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
