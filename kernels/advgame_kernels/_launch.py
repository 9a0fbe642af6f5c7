"""Where a Triton kernel is launched: on the device of its tensors, whichever one is current."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; a model spread over several has tensors on others."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
