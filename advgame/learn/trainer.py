"""What a run asks of whoever trains a player: a model in this process, or shards of one on many ranks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from advgame_kernels import ema_decay
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from advgame.game.pairs import Group, Pair
from advgame.game.tree import Sample
from advgame.learn.part_files import Written
from advgame.learn.reference import ReferenceChoice
from advgame.learn.settings import LearnSettings

if TYPE_CHECKING:
    from advgame.publish.sharded import Senders

Metrics = dict[str, float]


@dataclass(frozen=True)
class SamplerGap:
    """|sampler − trainer| of summed log-probs, nats a sequence: mean and largest; and the mean length in tokens."""

    mean: float
    largest: float
    tokens: float


class Elsewhere(Protocol):
    """Ranks that hold a player's tensors, and write and read them themselves."""

    def write(self, folder: Path, player: str, *, beside: bool) -> Callable[[], Mapping[str, Written]]:
        """Has the ranks copy what they hold into host memory, and write it into a folder of a checkpoint.

        beside: they write while this goes on. What is returned waits until all is on the disk, in any thread, and gives
        the files by name. Both raise PartError.
        """

    def read(self, checkpoint: Path, player: str, previous: str | None) -> None:
        """Has the ranks go on from a checkpoint. previous: stem of the files that the average before the last one comes
        from; None: there shall be none. Raises PartError."""


@dataclass
class Whole:
    """A player's training state as a checkpoint holds it: model with fp32 master weights, averages by name, optimizer.

    previous may be filled; whatever has been changed counts once `Trainer.take` has it. elsewhere: who holds the
    values; the tensors here then have none (they are on torch's meta device).
    """

    model: PreTrainedModel
    shadow: dict[str, Tensor]
    previous: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    elsewhere: Elsewhere | None = None


class Trainer(ABC):
    """One player in training.

    averaged: whether a moving average samples, and not the live player. recomputes: whether pairs may compute their
    reference anew; reference: which one they take. updates: optimiser steps; averages: the average's steps.
    notes: what a user should know of how it trains. senders: the ranks that hold it, where they can send it to engines
    themselves.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settings: LearnSettings, *, lr: float | None, ema: bool, ahead: bool
    ):
        self.tokenizer = tokenizer
        self.settings = settings
        self.base_lr = lr or settings.lr
        self.averaged = ema
        self.recomputes = settings.objective in ("dpo", "ipo") and settings.reference in ("auto", "recompute")
        self.reference = ReferenceChoice(settings.reference, settings.reference_tolerance)
        self.updates = 0
        self.averages = 0
        self.notes: list[str] = []
        self.senders: Senders | None = None
        self._ahead = ahead

    def lr_at(self, progress: float) -> float:
        """Cosine from the base rate to `lr_final` of it; `progress` in [0, 1]."""
        floor = self.settings.lr_final
        return self.base_lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))

    def _next_decay(self) -> float:
        """Counts an update of the average and returns its decay."""
        self.averages += 1
        how = self.settings
        return ema_decay(how.ema_schedule, self.averages, decay=how.ema_decay, gamma=how.ema_gamma)

    @property
    def _keeps_previous(self) -> bool:
        """Whether what is played ahead may still refer to the average before the next one."""
        return self._ahead and self.reference.decided != "rollout"

    def _measured(self, values: Metrics) -> None:
        """Tells the choice of reference what an update has measured."""
        if "reference_change" in values and self.reference.decided is None:
            self.reference.measured(values["reference_change"])

    @abstractmethod
    def update_pairs(self, pairs: Sequence[Pair], progress: float) -> Metrics:
        """One optimiser step: gradient = sum over pairs / number of pairs. No pair: no step."""

    @abstractmethod
    def update_groups(self, groups: Sequence[Group], progress: float) -> Metrics:
        """One optimiser step of GRPO or REINFORCE++. No member that learns: no step."""

    @abstractmethod
    def sampler_gap(self, samples: Sequence[Sample]) -> SamplerGap:
        """How far the sampler's log-probs are from these weights' own, on as many samples as one forward takes.

        Called before an update: what sampled is then the average (the live player where there is none), unchanged.
        """

    @property
    @abstractmethod
    def published(self) -> Mapping[str, Tensor]:
        """Tensors of the names, shapes and device that `publish_into` and `serve_into` write: a plain model's."""

    @abstractmethod
    def publish_into(self, served: Mapping[str, Tensor]) -> None:
        """Moves the average one step and writes it into an engine's tensors (live player: a copy)."""

    @abstractmethod
    def serve_into(self, served: Mapping[str, Tensor]) -> None:
        """Writes the weights that sample, as they are, into an engine's tensors (a resumed run's first publish)."""

    def check_folder(self, folder: Path) -> None:  # noqa: B027  (who trains in this process sees what it sees)
        """Raises InputError unless everybody who holds the player can write into a folder of this process."""

    @abstractmethod
    def whole(self) -> Whole:
        """All that a checkpoint holds of this player."""

    @abstractmethod
    def take(self, whole: Whole) -> None:
        """Goes on from `whole`, which `whole()` made and a checkpoint has filled; the settings' own options stay."""
