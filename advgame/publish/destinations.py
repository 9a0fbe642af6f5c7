"""Where a trainer writes: views of the arena by source name, and staging for what lands in more than one piece."""

from __future__ import annotations

from collections.abc import Sequence
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


class Destinations:
    """`tensors[name]`: contiguous, of the source's shape and the engine's dtype, to be filled by the trainer.

    A source that one copy puts, whole and in order, into one contiguous place is written there directly. Others
    (tensor-parallel slices) are staged, and `scatter` copies them on. `plans` and `starts` (bytes) are by rank.
    """

    def __init__(self, plans: Sequence[Plan], arena: Tensor, starts: Sequence[int]):
        self.tensors: dict[str, Tensor] = {}
        self.staged: tuple[str, ...] = ()
        self._scatters: list[Scatter] = []
        pieces: dict[str, list[tuple[bool, Tensor, int, int]]] = {}
        for rank, (plan, start) in enumerate(zip(plans, starts, strict=True)):
            offsets, _ = plan.layout()
            flats = {
                s.name: flat_view(arena, start + offsets[s.name], s.elements, getattr(torch, s.dtype))
                for s in plan.storages
            }
            shapes = {source.name: source.shape for source in plan.sources}
            for number, copy in enumerate(plan.copies):
                direct = is_whole(copy, shapes[copy.source]) and copy.into.contiguous
                pieces.setdefault(copy.source, []).append(
                    (direct, view_of(flats[copy.target], copy.into), rank, number)
                )
        for source in plans[0].sources:
            (direct, into, *_), *more = pieces[source.name]
            if direct and not more:
                self.tensors[source.name] = into.view(source.shape)
                continue
            stage = torch.zeros(source.shape, dtype=into.dtype)
            self.tensors[source.name] = stage
            self.staged += (source.name,)
            for _, target, rank, number in pieces[source.name]:
                taken = plans[rank].copies[number].taken
                self._scatters.append(Scatter(view_of(stage.flatten(), taken), target))

    def scatter(self) -> None:
        """Copies staged sources to all their places; nothing to do for a model on one worker."""
        for one in self._scatters:
            one.into.copy_(one.taken)
