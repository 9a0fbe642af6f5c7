"""Numbers of one update, kept where they were computed until the end: one transfer instead of a wait for each."""

from __future__ import annotations

import torch
from torch import Tensor

from advgame.learn.ranks import Ranks


class Meter:
    """Running sums and maxima by name, as tensors of the device."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor | float] = {}
        self._most: set[str] = set()

    def add(self, name: str, value: Tensor | float) -> None:
        """Adds a number, or a tensor of one element."""
        if isinstance(value, Tensor):
            value = value.detach().double()
        self._values[name] = self._values[name] + value if name in self._values else value

    def most(self, name: str, value: Tensor | float) -> None:
        """Keeps the largest, also over ranks."""
        self._most.add(name)
        if isinstance(value, Tensor):
            value = value.detach().double()
        old = self._values.get(name)
        if isinstance(old, Tensor) and isinstance(value, Tensor):
            value = torch.maximum(old, value)
        elif old is not None:
            value = max(float(old), float(value))
        self._values[name] = value

    def read(self, ranks: Ranks | None = None) -> dict[str, float]:
        """Everything as plain numbers, sums added and maxima taken over `ranks`. The one place that waits for the
        device."""
        on_device = {name: value for name, value in self._values.items() if isinstance(value, Tensor)}
        numbers = torch.stack(list(on_device.values())).tolist() if on_device else []
        own = self._values | dict(zip(on_device, numbers, strict=True))
        if ranks is None or ranks.size == 1:
            return own
        read: dict[str, float] = {}
        for values, most in ranks.gather((own, self._most)):
            for name, value in values.items():
                merge = max if name in most else sum
                read[name] = merge((read[name], value)) if name in read else value
        return read
