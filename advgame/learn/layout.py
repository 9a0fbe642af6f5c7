"""Which rank holds which piece of a sharded player, and how pieces travel to and from rank 0.

A piece is a run of a parameter's elements, flattened. Only checkpoints, and publishing to an engine in rank 0's own
memory, bring pieces together here, one parameter at a time; rank 0 need not hold any of the player itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from advgame.learn.team import Team

Span = tuple[int, int]
"""First element and number of elements."""


@dataclass(frozen=True)
class Layout:
    """shapes: of the whole parameters. members: ranks that hold them. held: by member, each parameter's span there.
    replicated: every member holds everything, and the first one's counts."""

    shapes: dict[str, tuple[int, ...]]
    members: tuple[int, ...]
    held: tuple[dict[str, Span], ...]
    replicated: bool

    def tree(self) -> dict[str, object]:
        """As JSON has it."""
        return {
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "members": list(self.members),
            "held": [[list(span) for span in own.values()] for own in self.held],
            "replicated": self.replicated,
        }

    @classmethod
    def of(cls, tree: Mapping[str, object]) -> Layout:
        """From `tree()`, which may have been JSON."""
        shapes, members, held = tree["shapes"], tree["members"], tree["held"]
        assert isinstance(shapes, dict)
        assert isinstance(members, list)
        assert isinstance(held, list)
        spans = tuple({name: (first, n) for name, (first, n) in zip(shapes, own, strict=True)} for own in held)
        return cls({k: tuple(v) for k, v in shapes.items()}, tuple(members), spans, bool(tree["replicated"]))

    @property
    def givers(self) -> Sequence[tuple[int, dict[str, Span]]]:
        """(rank, its spans) of those whose pieces make up the whole, each element once."""
        everyone = list(zip(self.members, self.held, strict=True))
        return everyone[:1] if self.replicated else everyone

    def collect(self, own: Mapping[str, Tensor], dtype: torch.dtype, team: Team) -> Iterator[tuple[str, Tensor]]:
        """On rank 0: (name, whole tensor) of every parameter, of `dtype`; must be walked to its end.

        own: rank 0's pieces, where it is a member. All members that are not rank 0 call `give` meanwhile.
        """
        for name, shape in self.shapes.items():
            if self.replicated and self.members[0] == 0:
                yield name, own[name].to(team.device, dtype).view(shape)
                continue
            whole = torch.empty(math.prod(shape), dtype=dtype, device=team.device)
            for rank, held in self.givers:
                start, length = held[name]
                into = whole.narrow(0, start, length)
                if rank == 0:
                    into.copy_(own[name])
                elif length:
                    team.receive(into, rank)
            yield name, whole.view(shape)

    def give(self, pieces: Mapping[str, Tensor], dtype: torch.dtype, team: Team) -> None:
        """A member's part of `collect`."""
        if self.replicated and team.rank != self.members[0]:
            return
        for name in self.shapes:
            own = pieces[name].to(team.device, dtype)
            if own.numel():
                team.send(own.contiguous(), 0)

    @torch.no_grad()
    def deal(self, wholes: Mapping[str, Tensor], own: Mapping[str, Tensor], team: Team) -> None:
        """On rank 0: sends every member its pieces of whole float32 tensors, and fills its `own`."""
        for name in self.shapes:
            flat = wholes[name].to(team.device, torch.float32).reshape(-1)
            for rank, held in zip(self.members, self.held, strict=True):
                start, length = held[name]
                part = flat.narrow(0, start, length)
                if rank == 0:
                    own[name].copy_(part)
                elif length:
                    team.send(part.contiguous(), rank)

    @torch.no_grad()
    def receive(self, pieces: Mapping[str, Tensor], team: Team) -> None:
        """A member's part of `deal`."""
        for name in self.shapes:
            if pieces[name].numel():
                part = torch.empty(pieces[name].shape, device=team.device)
                team.receive(part, 0)
                pieces[name].copy_(part)
