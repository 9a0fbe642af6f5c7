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


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second of the plainest passes over memory, reads and writes both counted."""

    copy: float  # one tensor into another; a CPU also reads each line that it is going to write, which nobody counts
    in_place: float  # one tensor read and written

    @property
    def best(self) -> float:
        """What floors are computed from."""
        return max(self.copy, self.in_place)


def bandwidth(device: torch.device, repeats: int) -> Bandwidth:
    """Measured on half a GiB, or 1 GiB on a GPU: too large for most caches."""
    elements = (1 << 28) if device.type == "cuda" else (1 << 27)
    source = torch.ones(elements, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    runs = {"copy": lambda: target.copy_(source), "in place": lambda: target.mul_(1.0)}
    copy, in_place = (8.0 * elements / (t.milliseconds / 1e3) for t in alternate(runs, device, repeats).values())
    return Bandwidth(copy, in_place)


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """The faster of the two, for floors."""
    return bandwidth(device, repeats).best


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
