"""The learner of a player that DeepSpeed shards over many ranks, as the run on rank 0 sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from advgame.errors import InputError
from advgame.game.pairs import Group, Pair
from advgame.game.tree import Sample
from advgame.learn.layout import Layout
from advgame.learn.load import outline
from advgame.learn.optimizer import make_optimizer
from advgame.learn.part_files import PartError, Written, await_parts, note_name
from advgame.learn.settings import LearnSettings
from advgame.learn.team import teams
from advgame.learn.trainer import Metrics, SamplerGap, Trainer, Whole
from advgame.learn.zero_calls import Shardholder, groups_message, pairs_message, samples_message
from advgame.learn.zero_send import TeamSenders
from advgame.publish.sharded import Sent


class DeepSpeedLearner(Trainer):
    """A player sharded over the ranks of its team; made and called on rank 0, which may be one of them or not.

    Every call tells the whole team what to do. `shard`: rank 0's own, where it has one.
    """

    def __init__(
        self,
        source: Path,
        tokenizer: PreTrainedTokenizerBase,
        settings: LearnSettings,
        *,
        field: str,
        lr: float | None = None,
        ema: bool = True,
        ahead: bool = False,
        device: torch.device | str = "cpu",
        remote_code: bool = False,
    ):
        super().__init__(tokenizer, settings, lr=lr, ema=ema, ahead=ahead)
        self._field = field
        self._device = torch.device(device)
        self.team = teams().of(field.partition(".")[0])
        self._holder = Shardholder(self.team)
        self._previous = ema and ahead and self.recomputes
        made = self._call(
            "make",
            folder=str(source.absolute()),
            settings=_elsewhere(settings).model_dump(mode="json"),
            lr=lr,
            ema=ema,
            ahead=ahead,
            remote_code=remote_code,
        )
        self.notes += made["notes"]
        self._layout = Layout.of(made["layout"])
        self._outline = outline(source, field, remote_code=remote_code)
        if self.team.members != (0,):
            self.senders = TeamSenders(self.team, self._field, self._layout, made["devices"], self._holder.perform)

    def _call(self, call: str, **details: Any) -> Any:
        """The result of a call that the whole team makes."""
        message = {"call": call, "player": self._field, **details}
        with self.team.turn(message):
            return self.team.call(message, self._holder.perform)

    def _moving(self, call: str, **details: Any) -> AbstractContextManager[None]:
        """Inside, the others move tensors as `call` says, and have nothing to tell at the end."""
        return self.team.turn({"call": call, "player": self._field, "silent": True, **details})

    def _own(self, what: str) -> Mapping[str, Tensor]:
        """Rank 0's own pieces, none where it is no member."""
        shard = self._holder.shards.get(self._field)
        return {} if shard is None else shard.pieces(what)

    def update_pairs(self, pairs: Sequence[Pair], progress: float) -> Metrics:
        if not pairs:
            return {"pairs": 0.0}
        decided = self.reference.decided
        values: Metrics = self._call("pairs", pairs=pairs_message(pairs), progress=progress, decided=decided)
        self.updates += 1
        self._measured(values)
        return values

    def update_groups(self, groups: Sequence[Group], progress: float) -> Metrics:
        if not any(member.weight for group in groups for member in group.members):
            return {"members": 0.0}
        values: Metrics = self._call("groups", groups=groups_message(groups), progress=progress)
        self.updates += 1
        return values

    def sampler_gap(self, samples: Sequence[Sample]) -> SamplerGap:
        return SamplerGap(**self._call("gap", samples=samples_message(samples)))

    @property
    def published(self) -> Mapping[str, Tensor]:
        """Names, shapes and device; no values."""
        empty = torch.zeros((), device=self._device)
        return {name: empty.expand(shape) for name, shape in self._layout.shapes.items()}

    @torch.no_grad()
    def publish_into(self, served: Mapping[str, Tensor]) -> None:
        """The average moves on every shard, without a word between them, and is then served."""
        self._previous = self._previous and self._keeps_previous
        if self.averaged:
            self._call("average", decay=self._next_decay(), keeps=self._previous)
        self.serve_into(served)

    @torch.no_grad()
    def serve_into(self, served: Mapping[str, Tensor]) -> None:
        """Gathers what samples on rank 0, unless the ranks send it themselves: then it says what they shall send."""
        what = "shadow" if self.averaged else "live"
        if isinstance(served, Sent):
            served.what = what
            return
        dtypes = {served[name].dtype for name in self._layout.shapes}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        for name, whole in self._gathered(what, dtype):
            served[name].copy_(whole)

    def _gathered(self, what: str, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors; whoever asks must take them all."""
        with self._moving("collect", what=what, dtype=str(dtype).removeprefix("torch.")):
            yield from self._layout.collect(self._own(what), dtype, self.team)

    def whole(self) -> Whole:
        """Names and shapes; the values stay with the ranks."""
        model = self._outline
        optimizer = make_optimizer(model.parameters(), self.settings, self.base_lr, model.device)
        shadow, previous = (
            {name: p.detach() for name, p in model.named_parameters()} if there else {}
            for there in (self.averaged, self._previous)
        )
        return Whole(model, shadow, previous, optimizer, elsewhere=self)

    def take(self, whole: Whole) -> None:
        """The ranks took theirs when it was read."""

    def check_folder(self, folder: Path) -> None:
        if errors := self._call("sees", folder=str(folder.absolute())):
            raise InputError(errors[0])

    def write(self, folder: Path, player: str, *, beside: bool) -> Callable[[], Mapping[str, Written]]:
        folder = folder.absolute()
        self._unless(self._call("write", folder=str(folder), name=player, beside=beside, previous=self._previous))
        ranks = [rank for rank, _ in self._layout.writers]
        notes = {note_name(player, number, len(ranks)): rank for number, rank in enumerate(ranks)}
        return partial(await_parts, folder, notes, self.team.check)

    def read(self, checkpoint: Path, player: str, previous: str | None) -> None:
        self._unless(self._call("read", folder=str(checkpoint.absolute()), name=player, previous=previous))
        self._previous = previous is not None

    @staticmethod
    def _unless(errors: Sequence[str]) -> None:
        if errors:
            raise PartError(errors[0])


def _elsewhere(settings: LearnSettings) -> LearnSettings:
    """As a rank in another folder, or on another node with the same files, understands them."""
    given = settings.deepspeed.config
    if given is None:
        return settings
    return settings.model_copy(update={"deepspeed": settings.deepspeed.model_copy(update={"config": given.absolute()})})
