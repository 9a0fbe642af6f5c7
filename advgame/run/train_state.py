"""What a checkpoint is made of: the players as they learn, or as they were when they were frozen."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from advgame.game.rewards import TreeRewards
from advgame.game.tree import Tree
from advgame.learn.settings import LoraSettings
from advgame.learn.trainer import Elsewhere
from advgame.run.optimizer_state import Packed, pack_optimizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class PlayerState:
    """One player as the learner holds it.

    model: the live player, fp32 master weights. shadow: its fp32 EMA by parameter name, empty when there is
    none. optimizer: None for a player that does not learn. updates: optimizer updates made so far. previous: the
    EMA before the last publish, empty unless something refers to it; recomputes: whether something may. lora: how its
    adapters were made. elsewhere: the ranks that hold it, where the tensors here have no values. values, packed: what
    stands for the model's tensors, by their ids, and for the optimizer once it is `frozen`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    shadow: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer | None
    updates: int
    previous: MutableMapping[str, Tensor] = field(default_factory=dict)
    recomputes: bool = False
    lora: LoraSettings | None = None
    elsewhere: Elsewhere | None = None
    values: Mapping[int, Tensor] = field(default_factory=dict)
    packed: Packed | None = None


@dataclass(frozen=True)
class TrainState:
    """All that a resume needs.

    `step` counts finished steps; `extra` is JSON-able (decisions, counters); `trees` were played for later steps.
    """

    step: int
    players: Mapping[str, PlayerState]
    extra: Mapping[str, Any]
    trees: Sequence[tuple[Tree, TreeRewards]] = ()


def frozen(state: TrainState) -> TrainState:
    """`state` as it is now, in host memory of its own: 16 bytes a parameter of every player that learns here.

    Merged weights of adapters are made while they are written, so a player under learn.lora must not change meanwhile.
    """
    return replace(
        state,
        players={name: player if player.elsewhere else _frozen(player) for name, player in state.players.items()},
        extra=copy.deepcopy(dict(state.extra)),
    )


def _frozen(player: PlayerState) -> PlayerState:
    packed = None
    if player.optimizer is not None:
        tensors, described = pack_optimizer(player.optimizer, parameters_of(player.model))
        packed = Packed(_copied(tensors), copy.deepcopy(described))
    held = {id(tensor): _host_copy(tensor) for tensor in player.model.state_dict(keep_vars=True).values()}
    return replace(player, shadow=_copied(player.shadow), previous=_copied(player.previous), values=held, packed=packed)


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: _host_copy(tensor) for name, tensor in tensors.items()}


def _host_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name; a tied one once, under its first name."""
    return dict(model.named_parameters())
