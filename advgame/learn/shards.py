"""What one rank holds of a player's fp32 master weights under DeepSpeed, parameter by parameter.

Masters, moments and averages are cut alike, so that an average moves without a word to the other ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from advgame.learn.layout import Layout
from advgame.learn.team import Team

MOMENTS = ("exp_avg", "exp_avg_sq")


def kinds(steps: float, *, averaged: bool, previous: bool) -> tuple[str, ...]:
    """What a checkpoint holds of a player, in the order in which all ranks write and read it.

    steps: that the optimizer has made. previous: whether there is an average before the last one.
    """
    held = {"shadow": averaged, "previous": previous}
    return ("live", *(MOMENTS if steps else ()), *(what for what, there in held.items() if there))


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + length) of a flattened parameter, and where they lie in a flat master."""

    start: int
    length: int
    flat: int = 0  # which flat master tensor
    offset: int = 0


class Shards:
    """This rank's pieces of `parameters`, inside a DeepSpeed engine that was just made.

    shapes: of the whole parameters. layout: who holds what of them. flats: the fp32 tensors that the optimizer steps
    (at stage 0 the parameters).
    """

    def __init__(
        self,
        engine: Any,
        stage: int,
        parameters: Mapping[str, Any],  # DeepSpeed adds to what a Parameter has
        optimizer: torch.optim.Optimizer,
        team: Team,
    ):
        self._engine, self._stage, self._parameters = engine, stage, parameters
        self._optimizer = optimizer
        self._number = team.members.index(team.rank)
        self.shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
        if stage == 0:
            self.flats: list[Tensor] = list(parameters.values())
        elif stage == 3:
            self.flats = list(engine.optimizer.fp32_partitioned_groups_flat)
        else:
            self.flats = [group["params"][0] for group in optimizer.param_groups]
        self.pieces = {name: self._piece(i, p) for i, (name, p) in enumerate(parameters.items())}
        spans = {name: (piece.start, piece.length) for name, piece in self.pieces.items()}
        self.layout = Layout(self.shapes, team.members, tuple(team.ranks.gather(spans)), replicated=stage == 0)
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
            start = min(self._number * held, p.ds_numel)
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
                    for flat, before in zip(self.flats, kept, strict=True):
                        flat.detach().copy_(before)
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
