"""Without a GPU, Triton kernels run in Triton's interpreter; that is decided before the kernels are first imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
