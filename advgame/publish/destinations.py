"""Where a trainer writes: views of the arena by source name, and staging for what lands in more than one piece."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from advgame_kernels import PreparedSums
from torch import Tensor

from advgame.publish.arena import flat_view, unsigned
from advgame.publish.copies import Copies
from advgame.publish.plan import Plan, is_whole
from advgame.publish.record import view_of


class Destinations(Mapping[str, Tensor]):
    """By source name: a contiguous tensor of the source's shape and the engine's dtype, for the trainer to fill.

    A source that one copy puts, whole and in order, into one contiguous place is written there directly. Others
    (tensor-parallel slices, an engine on another GPU) are staged, and `scatter` copies them on. `plans` and `parts`
    (the memory of each rank, uint8) are by rank. device: the trainer's, where it is another than the engine's.

    verify: whoever writes shall take the sums of what the engine will read, after everything has been copied.
    """

    def __init__(self, plans: Sequence[Plan], parts: Sequence[Tensor], device: torch.device | None = None):
        self.tensors: dict[str, Tensor] = {}
        self.staged: tuple[str, ...] = ()
        self.scattered = self.summed = self.verify = False
        self._plans, self._parts, self._sums = plans, parts, list[PreparedSums]()
        self._of: list[str] = []  # whose each copy is
        self.key = " ".join(plan.hash for plan in plans)
        scatters: list[tuple[Tensor, Tensor]] = []
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
                scatters.append((target, view_of(stage.flatten(), taken)))
                self._of.append(source.name)
        self.copies = Copies(scatters)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def sums(self) -> list[PreparedSums]:
        """By rank: the sums of its storages, in the plan's order; made when they are first asked for."""
        if not self._sums:
            for plan, part in zip(self._plans, self._parts, strict=True):
                offsets, _ = plan.layout()
                whole = [flat_view(part, offsets[s.name], s.bytes, torch.uint8) for s in plan.storages]
                self._sums.append(PreparedSums(whole))
        return self._sums

    def renew(self) -> None:
        """Makes what holds addresses anew."""
        self.copies, self._sums = Copies(self.copies.pairs), []

    def scatter(self) -> None:
        """Copies staged sources to all their places; nothing to do for a model on one worker."""
        self.copies()
        self.scattered = True

    def sum_up(self) -> None:
        """Takes the sums of all parts. Those on another GPU than the copies came from wait for these first."""
        for sums in self.sums:
            if len(self.copies) and sums.device.type == "cuda" and sums.device != self.copies.device:
                torch.cuda.current_stream(sums.device).wait_stream(torch.cuda.current_stream(self.copies.device))
            sums.launch()
        self.summed = True

    def checksums(self) -> list[dict[str, int]]:
        """Of every storage, by rank and name: those that whoever wrote has taken, or taken now."""
        if not self.summed:
            self.sum_up()
        self.summed = False
        return [
            dict(zip((s.name for s in plan.storages), unsigned(sums.out), strict=True))
            for plan, sums in zip(self._plans, self.sums, strict=True)
        ]

    def astray(self) -> list[str]:
        """Sources of which some copy differs from what was staged: sums of the engine's memory alone would not tell."""
        pairs = zip(self._of, self.copies.pairs, strict=True)
        wrong = [name for name, (into, taken) in pairs if not torch.equal(_bits(into), _bits(taken).to(into.device))]
        return list(dict.fromkeys(wrong))

    def settle(self) -> None:
        """Scatters unless whoever wrote has done so; the next write starts anew."""
        if not self.scattered:
            self.scatter()
        self.scattered = False


def _bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes: two NaNs are equal, and 0 is not -0."""
    return tensor.detach().flatten().view(torch.uint8)
