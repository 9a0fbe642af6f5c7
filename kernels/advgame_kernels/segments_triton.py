"""Tables of addresses for kernels over a whole model: a row a tensor, which a program finds by its segment's number.

A tensor is cut into segments, a program's share each; a row tells at which one its tensor begins. A row a segment would
need no search, and a hundred thousand rows for a 7 B model.
"""

# Triton kernels carry no annotations but constexpr.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def row_of(table, segment, rows, WIDTH: tl.constexpr, FIRST: tl.constexpr, BISECTIONS: tl.constexpr):
    """The row whose tensor holds a segment. WIDTH: of a row; FIRST: column of a tensor's first segment."""
    low = 0
    high = rows
    for _ in tl.static_range(BISECTIONS):  # first segment of `low` <= segment < first segment of `high`
        middle = (low + high) // 2
        right = tl.load(table + middle * WIDTH + FIRST) <= segment
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
    return table + low * WIDTH


def bisections(rows: Sequence[object] | Tensor) -> int:
    """BISECTIONS that find a row of so many."""
    return len(rows).bit_length()


def on_device(table: Tensor, device: torch.device) -> Tensor:
    """The table where kernels read it; the host waits for nothing."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
