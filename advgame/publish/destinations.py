"""Where a trainer writes: views of the arena by source name, and staging for what lands in more than one piece."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from advgame.publish.arena import flat_view
from advgame.publish.plan import Plan, is_whole
from advgame.publish.record import view_of


@dataclass(frozen=True)
class Scatter:
    """A copy that follows a write: from a staged source into the arena."""

    taken: Tensor
    into: Tensor


class Destinations(Mapping[str, Tensor]):
    """By source name: a contiguous tensor of the source's shape and the engine's dtype, for the trainer to fill.

    A source that one copy puts, whole and in order, into one contiguous place is written there directly. Others
    (tensor-parallel slices, an engine on another GPU) are staged, and `scatter` copies them on. `plans` and `parts`
    (the memory of each rank, uint8) are by rank. device: the trainer's, where it is another than the engine's.
    """

    def __init__(self, plans: Sequence[Plan], parts: Sequence[Tensor], device: torch.device | None = None):
        self.tensors: dict[str, Tensor] = {}
        self.staged: tuple[str, ...] = ()
        self.scatters: list[Scatter] = []
        self.scattered = False
        self.key = " ".join(plan.hash for plan in plans)
        pieces: dict[str, list[tuple[bool, Tensor, int, int]]] = {}
        for rank, (plan, part) in enumerate(zip(plans, parts, strict=True)):
            offsets, _ = plan.layout()
            flats = {
                s.name: flat_view(part, offsets[s.name], s.elements, getattr(torch, s.dtype)) for s in plan.storages
            }
            shapes = {source.name: source.shape for source in plan.sources}
            near = device is None or part.device == device
            for number, copy in enumerate(plan.copies):
                direct = near and is_whole(copy, shapes[copy.source]) and copy.into.contiguous
                pieces.setdefault(copy.source, []).append(
                    (direct, view_of(flats[copy.target], copy.into), rank, number)
                )
        for source in plans[0].sources:
            (direct, into, *_), *more = pieces[source.name]
            if direct and not more:
                self.tensors[source.name] = into.view(source.shape)
                continue
            stage = torch.zeros(source.shape, dtype=into.dtype, device=device or into.device)
            self.tensors[source.name] = stage
            self.staged += (source.name,)
            for _, target, rank, number in pieces[source.name]:
                taken = plans[rank].copies[number].taken
                self.scatters.append(Scatter(view_of(stage.flatten(), taken), target))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def scatter(self) -> None:
        """Copies staged sources to all their places; nothing to do for a model on one worker."""
        for one in self.scatters:
            one.into.copy_(one.taken)
        self.scattered = True

    def settle(self) -> None:
        """Scatters unless whoever wrote has done so; the next write starts anew."""
        if not self.scattered:
            self.scatter()
        self.scattered = False
