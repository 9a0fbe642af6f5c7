"""Published tensors packed into buckets: one flat buffer a bucket, in the order of the plan, for collective transports.

A source lies whole in one bucket, so that a receiver needs no more than the bucket at hand to make its copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from advgame.publish.arena import checksum, flat_view
from advgame.publish.binding import copy_name
from advgame.publish.plan import ALIGNMENT, ITEM_BYTES, Plan
from advgame.publish.record import view_of


@dataclass(frozen=True)
class Packed:
    """A source on the wire: bytes from `offset` of the whole buffer, as `dtype`, which is the engine's."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    def of(self, buffer: Tensor, start: int = 0) -> Tensor:
        """Its flat view in `buffer` (uint8), whose first byte is byte `start` of the whole."""
        return flat_view(buffer, self.offset - start, prod(self.shape), getattr(torch, self.dtype))


@dataclass(frozen=True)
class Layout:
    """Where every source lies, and where buckets begin and end (bytes; `bounds` has one entry more than buckets)."""

    packed: tuple[Packed, ...]
    bounds: tuple[int, ...]

    @property
    def largest(self) -> int:
        return max(end - begin for begin, end in pairwise(self.bounds))

    def to_tree(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Layout:
        packed = tuple(Packed(p["name"], p["dtype"], tuple(p["shape"]), p["offset"]) for p in tree["packed"])
        return cls(packed, tuple(tree["bounds"]))


def layout_of(plans: Sequence[Plan], bucket_bytes: int) -> Layout:
    """Sources in the order in which the first rank's loader asks for them; a bucket ends where it would grow too large.

    A source larger than `bucket_bytes` makes a bucket of its own.
    """
    targets = {storage.name: storage.dtype for plan in plans for storage in plan.storages}
    dtypes = {copy.source: targets[copy.target] for plan in plans for copy in plan.copies}
    packed: list[Packed] = []
    bounds, end = [0], 0
    for source in plans[0].sources:
        one = Packed(source.name, dtypes[source.name], source.shape, end)
        if end > bounds[-1] and end + one.bytes - bounds[-1] > bucket_bytes:
            bounds.append(end)
        packed.append(one)
        end += -(-one.bytes // ALIGNMENT) * ALIGNMENT
    return Layout(tuple(packed), (*bounds, end))


class Unpacker:
    """A receiver's copies, bucket by bucket, into the flat storages of its model."""

    def __init__(self, layout: Layout, plan: Plan, flats: Mapping[str, Tensor], device: torch.device):
        self.layout, self.plan, self.flats = layout, plan, flats
        self.buffer = torch.empty(layout.largest, dtype=torch.uint8, device=device)
        packed = {one.name: one for one in layout.packed}
        self._copies: list[dict[str, tuple[Tensor, Tensor]]] = []
        for begin, end in pairwise(layout.bounds):
            inside = [(i, c) for i, c in enumerate(plan.copies) if begin <= packed[c.source].offset < end]
            self._copies.append(
                {
                    copy_name(i, c): (
                        view_of(flats[c.target], c.into),
                        view_of(packed[c.source].of(self.buffer, begin), c.taken),
                    )
                    for i, c in inside
                }
            )

    def bucket(self, number: int) -> Tensor:
        """The part of the buffer that bucket `number` fills."""
        begin, end = self.layout.bounds[number : number + 2]
        return self.buffer[: end - begin]

    def unpack(self, number: int) -> None:
        """Copies a received bucket to its places."""
        for into, taken in self._copies[number].values():
            into.copy_(taken)

    def taken_checksums(self, number: int) -> dict[str, int]:
        """Of what the copies of a received bucket place, as `binding.copied_checksums` finds it there afterwards."""
        return {name: checksum(taken) for name, (_, taken) in self._copies[number].items()}
