"""Which rank holds which piece of a sharded player, and how pieces come together, one parameter at a time.

A piece is a run of a parameter's elements, flattened. For an engine in rank 0's own memory they travel to rank 0, which
need not hold any of the player itself; for a checkpoint to the ranks that write it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from advgame.learn.part_files import divide
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

    @property
    def writers(self) -> list[tuple[int, list[str]]]:
        """(rank, parameters that it writes into a checkpoint) of every member that writes any."""
        divided = divide(self.shapes, len(self.members))
        return [(rank, names) for rank, names in zip(self.members, divided, strict=True) if names]

    @torch.no_grad()
    def regroup(self, own: Mapping[str, Tensor], team: Team) -> dict[str, Tensor]:
        """On every member, together: whole copies, float32 in host memory, of the parameters that this one writes.

        own: its pieces. Every writer gets one parameter at a time, all of them at once.
        """
        if self.replicated:
            names = dict(self.writers).get(team.rank, [])
            copies = {name: own[name].to("cpu", torch.float32, copy=True) for name in names}
            return {name: copy.view(self.shapes[name]) for name, copy in copies.items()}
        wholes: dict[str, Tensor] = {}
        for turn in zip_longest(*(share for _, share in self.writers)):
            named = zip(self.writers, turn, strict=True)
            wanted: dict[int, str] = {writer: name for (writer, _), name in named if name is not None}
            mine = wanted.get(team.rank)
            whole = torch.empty(math.prod(self.shapes[mine]) if mine else 0, device=team.device)
            moves: list[dist.P2POp] = []
            for writer, name in wanted.items():
                for rank, held in self.givers:
                    start, length = held[name]
                    if not length:
                        continue
                    if writer == rank == team.rank:
                        whole.narrow(0, start, length).copy_(own[name])
                    elif writer == team.rank:
                        into = whole.narrow(0, start, length)
                        moves.append(dist.P2POp(dist.irecv, into, self.members.index(rank)))
                    elif rank == team.rank:
                        piece = own[name].to(team.device, torch.float32).contiguous()
                        moves.append(dist.P2POp(dist.isend, piece, self.members.index(writer)))
            for move in dist.batch_isend_irecv(moves) if moves else ():
                move.wait()
            if mine:
                wholes[mine] = whole.cpu().view(self.shapes[mine])
        return wholes
