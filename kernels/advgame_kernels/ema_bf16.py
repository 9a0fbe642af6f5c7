"""A bfloat16 shadow that still follows steps below half an ulp: by stochastic rounding or by compensation.

Stochastic rounding adds 16 random bits below the kept ones and truncates: each update rounds up with just the
probability that makes it right on average. Compensation keeps what rounding dropped in a second bfloat16 tensor
and adds it back next time: shadow + compensation then carries about 16 bits of mantissa, deterministically, for
the bytes of a float32 shadow. These are the torch forms; ema_triton.py has both in its one launch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_stochastically(
    x: Tensor,  # float32
    generator: torch.Generator,
) -> Tensor:  # bfloat16, one of the two neighbours of x, with expectation x
    """Round to bfloat16 at random. Infinities stay; a NaN stays a NaN."""
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    bits = (x.view(torch.int32) + noise) & -65536  # the kept half of a float32 is a bfloat16: 0xFFFF0000
    return torch.where(x.isfinite(), bits.view(torch.float32), x).to(torch.bfloat16)


def stochastic_update_(
    shadow: Tensor,  # bfloat16
    param: Tensor,
    step: float | Tensor,
    generator: torch.Generator,
) -> None:
    """shadow += step · (param − shadow), rounded at random."""
    wide = shadow.float()
    shadow.copy_(round_stochastically(wide + step * (param.float() - wide), generator))


def compensated_update_(
    shadow: Tensor,  # bfloat16
    param: Tensor,
    step: float | Tensor,
    compensation: Tensor,  # bfloat16, zeros to begin with; what rounding has dropped so far
) -> None:
    """(shadow + compensation) += step · (param − shadow − compensation), kept in two bfloat16 numbers."""
    exact = shadow.float() + compensation.float()
    exact += step * (param.float() - exact)
    shadow.copy_(exact)
    compensation.copy_(exact - shadow.float())
