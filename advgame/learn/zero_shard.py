"""One rank's part of a player that DeepSpeed shards. All members of a team make the same calls in the same order."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from advgame_kernels import ema_update_
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from advgame.game.pairs import Group, Pair
from advgame.learn.learner import Learner, Out
from advgame.learn.micro import shares
from advgame.learn.settings import LearnSettings
from advgame.learn.shards import MOMENTS, Shards, kinds
from advgame.learn.team import Team
from advgame.learn.trainer import Metrics
from advgame.learn.zero_config import engine_config, read_json, stage_of
from advgame.learn.zero_quiet import quietly


class _Entry(nn.Module):
    """What DeepSpeed takes for the model: a forward pass is whatever `compute` says, with the model's hooks around."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.compute: Callable[[], Tensor] | None = None

    def forward(self) -> Tensor:
        assert self.compute is not None
        return self.compute()


class ZeroShard(Learner):
    """A rank's shard of a player. Given the whole update, it computes its own share of it.

    live, shadow, initial, previous: this rank's pieces of the master weights and of what stands beside them, 1-D.
    buffers: those of the model that a checkpoint holds.
    """

    _in_place = False  # DeepSpeed takes gradients from autograd's hands

    def __init__(
        self,
        team: Team,
        source: Path,
        tokenizer: PreTrainedTokenizerBase,
        settings: LearnSettings,
        *,
        field: str,
        lr: float | None,
        ema: bool,
        ahead: bool,
        remote_code: bool,
    ):
        self.team = team
        self._stage = stage_of(settings, read_json(settings.deepspeed.config))
        super().__init__(
            source, tokenizer, settings, field=field, lr=lr, ema=ema, ahead=ahead, device=team.device,
            remote_code=remote_code, ranks=team.ranks,
        )  # fmt: skip

    def _made_optimizer(self) -> torch.optim.Optimizer:
        optimizer = super()._made_optimizer()
        kept = self.model.state_dict().keys()  # of buffers a checkpoint holds these; DeepSpeed may cast them
        self.buffers = {n: b.detach().to("cpu", copy=True) for n, b in self.model.named_buffers() if n in kept}
        with quietly():
            if self.team.device.type == "cpu":
                os.environ.setdefault("DS_ACCELERATOR", "cpu")
            import deepspeed

            # an operator for inference that no training call reaches: compiling it takes half a minute, and a start
            # that is killed meanwhile leaves a lock on which every later one hangs
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            # no name of a parameter may change: the entry is put around the model for DeepSpeed alone
            self._entry = _Entry(self.model).eval()
            self._engine, *_ = deepspeed.initialize(
                model=self._entry,
                model_parameters=list(self.parameters.values()),
                optimizer=optimizer,
                config=engine_config(self.settings),
                dist_init_required=False,
            )
        self._entry.eval()
        if self._stage == 3:  # the losses read the head outside its module: it is gathered for the whole entry
            for part in (self.head.weight, self.head.bias):
                if part is not None:
                    deepspeed.zero.register_external_parameter(self._entry, part)
        self.shards = Shards(self._engine, self._stage, self.parameters, optimizer, self.team)
        return optimizer

    @property
    def live(self) -> Mapping[str, Tensor]:
        return self.shards.live

    def update_pairs(self, pairs: Sequence[Pair], progress: float) -> Metrics:
        units = [(pair, (pair.chosen, pair.rejected)) for pair in pairs]
        return super().update_pairs(self._own(units), progress)

    def update_groups(self, groups: Sequence[Group], progress: float) -> Metrics:
        units = [(group, [member.sample for member in group.members]) for group in groups]
        return super().update_groups(self._own(units), progress)

    def _own(self, units: Sequence[tuple[Any, Sequence[Any]]]) -> list[Any]:
        """This rank's share of an update."""
        made = shares(units, len(self.team.members), self.settings.micro_tokens, share=self.share)
        return [unit for unit, _ in made[self.team.members.index(self.team.rank)]]

    def _forward(self, compute: Callable[[], Tensor]) -> Tensor:
        self._entry.compute = compute
        try:
            value: Tensor = self._engine()
        finally:
            self._entry.compute = None
        return value

    def _backward(self, compute: Callable[[], Out], *, real: bool, last: bool) -> Out:
        made: list[Out] = []

        def loss() -> Tensor:
            made.append(compute())
            return made[0].loss

        self._engine.set_gradient_accumulation_boundary(last)
        value = self._forward(loss)
        # DeepSpeed divides what it sums over the ranks by their number
        self._engine.backward(value * (float(self.ranks.size) if real else 0.0))
        return made[0]

    def _apply(self, progress: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(progress)
        norm = None
        if self._stage == 0:
            gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            torch._foreach_div_(gradients, (norm / self.settings.clip_norm).clamp(min=1.0))
        self._engine.step()
        self.updates += 1
        found = self._engine.get_global_grad_norm() if norm is None else norm
        return torch.as_tensor(found, device=self.team.device)

    def _standing_in(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        return self.shards.standing_in(weights)

    def _autocast(self) -> AbstractContextManager[object]:
        return super()._autocast() if self._stage == 0 else nullcontext()  # else the weights are bfloat16 themselves

    @torch.no_grad()
    def average(self, decay: float, keeps: bool) -> None:
        """Moves this rank's piece of the average in place; `keeps`: the one before is still referred to."""
        if not keeps:
            self.previous = {}
        for name, old in self.previous.items():
            old.copy_(self.shadow[name])
        live = self.live
        held = [name for name, own in live.items() if own.numel()]
        if held:
            ema_update_([self.shadow[name] for name in held], [live[name] for name in held], decay)

    def pieces(self, what: str) -> Mapping[str, Tensor]:
        """This rank's pieces: live, shadow, previous, exp_avg or exp_avg_sq."""
        return self.shards.moments(what) if what in MOMENTS else getattr(self, what)

    def take_pieces(self, steps: float, previous: bool, fill: Callable[[str, Mapping[str, Tensor]], None]) -> None:
        """Goes on from a checkpoint: `fill(what, pieces)` puts its values into every kind of pieces. What computes
        follows when all ranks have them (`Shards.refresh`).

        steps: that the optimizer had made. previous: whether there shall be an average before the last one.
        """
        self.shards.steps = steps
        if not previous:
            self.previous = {}
        elif not self.previous:
            self.previous = {name: torch.zeros_like(own) for name, own in self.live.items()}
        for what in kinds(steps, averaged=self.averaged, previous=previous):
            fill(what, self.pieces(what))
