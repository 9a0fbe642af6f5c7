"""The ranks that train one player together: sums over all of them, and equal numbers of micro-batches.

An update's gradient is a sum over the data of all ranks, divided by what all of them have together. So every rank
divides by the global number, and gradients are added, not averaged: ranks with little data, or none, count for what
they have. Every rank makes the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Ranks:
    """The members of a torch.distributed process group; without a group this process alone, which sends nothing."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)

    def gather(self, own: T) -> list[T]:
        """Every rank's small host value, in the order of ranks."""
        if self.group is None:
            return [own]
        everyone: list[T | None] = [None] * self.size
        dist.all_gather_object(everyone, own, group=self.group)
        return everyone  # type: ignore[return-value]  # all are there now

    def sum(self, own: float) -> float:
        """A host number, added over the ranks."""
        return sum(self.gather(own))

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Adds each tensor over the ranks, in place; the same tensors in the same order everywhere."""
        if self.group is not None:
            for work in [dist.all_reduce(tensor, group=self.group, async_op=True) for tensor in tensors]:
                assert work is not None, "this process is a member of the group"
                work.wait()

    def moments(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (no correction) of the elements of all ranks, on the device of `values`."""
        if self.group is None:
            return values.mean(), values.std(correction=0)
        sums = torch.stack([values.new_tensor(values.numel()), values.sum()]).double()
        self.add_up([sums])
        mean = sums[1] / sums[0]
        squares = (values.double() - mean).square().sum()  # around the mean: no difference of large sums
        self.add_up([squares])
        return mean.to(values.dtype), (squares / sums[0]).sqrt().to(values.dtype)


def filled(parts: Sequence[T], filler: T, ranks: Ranks) -> Iterator[tuple[T, bool]]:
    """This rank's micro-batches (True), then as many fillers (False) as make it as many as on any other rank.

    Sharded models gather weights in every pass: ranks that stopped early would leave the others waiting.
    """
    most = max(ranks.gather(len(parts)))
    for part in parts:
        yield part, True
    for _ in range(most - len(parts)):
        yield filler, False
