"""What one rank holds of a player's fp32 master weights under DeepSpeed, parameter by parameter.

A piece is a run of a parameter's elements, flattened. Masters, moments and averages are cut alike, so that an average
moves without a word to the other ranks. Only publishing and checkpoints bring pieces together, on rank 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from advgame.learn.team import Team

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + length) of a flattened parameter, and where they lie in a flat master."""

    start: int
    length: int
    flat: int = 0  # which flat master tensor
    offset: int = 0


class Shards:
    """This rank's pieces of `parameters`, inside a DeepSpeed engine that was just made.

    shapes: of the whole parameters. flats: the fp32 tensors that the optimizer steps (at stage 0 the parameters).
    """

    def __init__(
        self,
        engine: Any,
        stage: int,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        team: Team,
    ):
        self._engine, self._stage, self._parameters = engine, stage, parameters
        self._optimizer, self._team = optimizer, team
        self.shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
        if stage == 0:
            self.flats: list[Tensor] = list(parameters.values())
        elif stage == 3:
            self.flats = list(engine.optimizer.fp32_partitioned_groups_flat)
        else:
            self.flats = [group["params"][0] for group in optimizer.param_groups]
        self.pieces = {name: self._piece(i, p) for i, (name, p) in enumerate(parameters.items())}
        table = [[piece.start, piece.length] for piece in self.pieces.values()]
        self._table = [dict(zip(self.pieces, rows, strict=True)) for rows in team.everyones(table)]
        for flat in self.flats:  # made here rather than in the first step: a checkpoint may fill them
            optimizer.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                **{name: torch.zeros_like(flat, requires_grad=False) for name in MOMENTS},
            }

    def _piece(self, number: int, p: Any) -> Piece:
        if self._stage == 0:
            return Piece(0, p.numel(), number)
        if self._stage == 3:
            zero = self._engine.optimizer
            flat, offset, held = zero.grad_position[zero.get_param_id(p)]
            start = min(self._team.rank * held, p.ds_numel)
            return Piece(start, min(held, p.ds_numel - start), flat, offset)
        mapped = p._hp_mapping
        if mapped is None:  # all of it lies on other ranks
            return Piece(0, 0)
        lp, hp = mapped.lp_fragment_address, mapped.hp_fragment_address
        return Piece(lp.start, lp.numel, mapped.param_group_index, hp.start)

    def _cut(self, flats: list[Tensor]) -> dict[str, Tensor]:
        return {
            name: flats[piece.flat].detach().view(-1).narrow(0, piece.offset, piece.length)
            for name, piece in self.pieces.items()
        }

    @property
    def live(self) -> dict[str, Tensor]:
        """Views of the masters: 1-D float32 by parameter name, empty where this rank holds nothing."""
        return self._cut(self.flats)

    def moments(self, entry: str) -> dict[str, Tensor]:
        """Views of the optimizer's `exp_avg` or `exp_avg_sq`."""
        return self._cut([self._optimizer.state[flat][entry] for flat in self.flats])

    @property
    def steps(self) -> float:
        """Steps that the optimizer has made."""
        return float(self._optimizer.state[self.flats[0]]["step"])

    @steps.setter
    def steps(self, value: float) -> None:
        for flat in self.flats:
            self._optimizer.state[flat]["step"].fill_(value)

    def gathered(self, pieces: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """All ranks call it and walk it to its end; (name, whole tensor) of `dtype` on rank 0, (name, own piece)
        elsewhere."""
        for name, shape in self.shapes.items():
            own = pieces[name].to(self._team.device, dtype)
            if self._stage == 0 or self._team.size == 1:
                yield name, own.view(shape) if self._team.leads else own
                continue
            if not self._team.leads:
                if own.numel():
                    dist.send(own.contiguous(), 0)
                yield name, own
                continue
            whole = torch.empty(shape, dtype=dtype, device=self._team.device)
            flat = whole.view(-1)
            for rank, held in enumerate(self._table):
                start, length = held[name]
                into = flat.narrow(0, start, length)
                if rank == 0:
                    into.copy_(own)
                elif length:
                    dist.recv(into, rank)
            yield name, whole

    @torch.no_grad()
    def scatter(self, wholes: Mapping[str, Tensor] | None, pieces: Mapping[str, Tensor]) -> None:
        """Fills every rank's `pieces` from whole float32 tensors, which rank 0 has. All ranks call it."""
        for name, shape in self.shapes.items():
            device = self._team.device
            if self._team.leads:
                assert wholes is not None
                flat = wholes[name].to(device, torch.float32).reshape(-1)
            if self._stage == 0:
                whole = flat if self._team.leads else torch.empty(shape, device=device).view(-1)
                if self._team.size > 1:
                    dist.broadcast(whole, 0)
                pieces[name].copy_(whole)
            elif self._team.leads:
                for rank, held in enumerate(self._table):
                    start, length = held[name]
                    part = flat.narrow(0, start, length).contiguous()
                    if rank == 0:
                        pieces[name].copy_(part)
                    elif length:
                        dist.send(part, rank)
            elif pieces[name].numel():
                part = torch.empty(pieces[name].shape, device=device)
                dist.recv(part, 0)
                pieces[name].copy_(part)

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes the weights that compute follow the masters, whose values were set. All ranks call it."""
        if self._stage in (1, 2):
            self._engine.optimizer.update_lp_params()
        elif self._stage == 3:
            self._put_partitions(self.live)

    @contextmanager
    def standing_in(self, pieces: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the player computes with `pieces` in the masters' place. All ranks enter and leave it together.

        Stage 3 puts them where the weights are gathered from; stages 1 and 2 gather them once on the way in and the
        masters once on the way out.
        """
        if self._stage == 0:
            own = {name: p.data for name, p in self._parameters.items()}
            try:
                for name, p in self._parameters.items():
                    p.data = pieces[name].view(self.shapes[name])
                yield
            finally:
                for name, p in self._parameters.items():
                    p.data = own[name]
        elif self._stage == 3:
            self._put_partitions(pieces)
            try:
                yield
            finally:
                self._put_partitions(self.live)
        else:
            kept = [flat.detach().clone() for flat in self.flats]
            try:
                with torch.no_grad():
                    for name, into in self.live.items():
                        into.copy_(pieces[name])
                self.refresh()
                yield
            finally:
                with torch.no_grad():
                    for flat, own in zip(self.flats, kept, strict=True):
                        flat.detach().copy_(own)
                self.refresh()

    @torch.no_grad()
    def _put_partitions(self, pieces: Mapping[str, Tensor]) -> None:
        zero = self._engine.optimizer
        # small parameters stay whole between steps: they are let go and gathered again
        zero._partition_all_parameters()
        for name, p in self._parameters.items():
            p.ds_tensor.data[: pieces[name].numel()].copy_(pieces[name])
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
