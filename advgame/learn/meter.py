"""Numbers of one update, kept where they were computed until the end: one transfer instead of a wait for each."""

from __future__ import annotations

import torch
from torch import Tensor


class Meter:
    """Running sums and maxima (their names: `maxima`), as tensors of the device."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor | float] = {}
        self.maxima: set[str] = set()

    def add(self, name: str, value: Tensor | float) -> None:
        """Adds a number, or a tensor of one element."""
        if isinstance(value, Tensor):
            value = value.detach().double()
        self._values[name] = self._values[name] + value if name in self._values else value

    def most(self, name: str, value: Tensor | float) -> None:
        """Keeps the largest."""
        self.maxima.add(name)
        old = self._values.get(name)
        if isinstance(value, Tensor):
            value = value.detach().double()
            self._values[name] = torch.maximum(old, value) if isinstance(old, Tensor) else value
        else:
            self._values[name] = value if old is None else max(float(old), value)

    def read(self) -> dict[str, float]:
        """Everything as plain numbers, in the order of first mention. The one place that waits for the device."""
        on_device = {name: value for name, value in self._values.items() if isinstance(value, Tensor)}
        numbers = torch.stack(list(on_device.values())).tolist() if on_device else []
        read = dict(zip(on_device, numbers, strict=True))
        return {name: read[name] if isinstance(value, Tensor) else value for name, value in self._values.items()}
