"""What the machine can do at best, measured in the same process run as everything that is held against it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.timing import alternate


@dataclass(frozen=True)
class HeadShape:
    """Rows, vocabulary and width of a linear head."""

    rows: int
    vocab: int
    width: int

    @property
    def flops(self) -> float:
        """Of logits, dHidden and dWeight together."""
        return 6.0 * self.rows * self.vocab * self.width

    def __str__(self) -> str:
        return f"{self.rows} rows, vocabulary {self.vocab}, width {self.width}"


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes a second, reads and writes both counted, of a device-to-device copy too large for any cache."""
    elements = (1 << 28) if device.type == "cuda" else (1 << 27)
    source = torch.ones(elements, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    timing = alternate({"copy": lambda: target.copy_(source)}, device, repeats)["copy"]
    return 8.0 * elements / (timing.milliseconds / 1e3)


def three_gemms(shape: HeadShape, dtype: torch.dtype, device: torch.device, repeats: int) -> float:
    """Milliseconds of bare products shaped like logits, dHidden and dWeight, all in `dtype`, outputs preallocated."""
    hidden = torch.randn(shape.rows, shape.width, device=device, dtype=torch.float32).to(dtype)
    weight = (torch.randn(shape.vocab, shape.width, device=device, dtype=torch.float32) * 0.02).to(dtype)
    logits = torch.empty(shape.rows, shape.vocab, device=device, dtype=dtype)
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=dhidden)
        torch.mm(logits.t(), hidden, out=dweight)

    return alternate({"gemms": run}, device, repeats)["gemms"].milliseconds
