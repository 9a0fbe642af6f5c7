"""The learner of one player on many ranks: DeepSpeed shards and reduces, everything else is the plain learner's.

Rank 0's learner is the run's; the other ranks hold its twins, which `Followers` drives. Every rank is told the whole
update and takes its share of it, so that all know the exact normalisers and the busiest rank's number of micro-batches.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from advgame_kernels import ema_update_
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from advgame.game.pairs import Group, Member, Pair
from advgame.game.tree import Sample
from advgame.learn.learner import Learner, Metrics, SamplerGap, Whole
from advgame.learn.meter import Meter
from advgame.learn.micro import Unit, micro_batches, shares
from advgame.learn.packing import PackedBatch, pack
from advgame.learn.settings import LearnSettings
from advgame.learn.shards import MOMENTS, Shards
from advgame.learn.team import Call, Team, team
from advgame.learn.zero_config import engine_config, read_json, stage_of
from advgame.rollout.chat import load_tokenizer

FILLER = Sample((0,), (0,), (0.0,), "stop", 0)


class _Entry(nn.Module):
    """What DeepSpeed takes for the model: a forward pass is whatever `compute` says, with the model's hooks around."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.compute: Callable[[], Tensor] | None = None

    def forward(self) -> Tensor:
        assert self.compute is not None
        return self.compute()


class DeepSpeedLearner(Learner):
    """A player sharded over the ranks of `team()`; the same calls as `Learner`, made on rank 0.

    live, shadow, initial, previous: this rank's pieces of the master weights and of what stands beside them, 1-D.
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
        self._team = team()
        self._field = field
        self._stage = stage_of(settings, read_json(settings.deepspeed.config))
        how = {"lr": lr, "ema": ema, "ahead": ahead, "remote_code": remote_code}
        described = {
            "player": field,
            "folder": str(source.absolute()),
            "settings": settings.model_dump(mode="json"),
            **how,
        }
        with self._together("make", **described):
            super().__init__(source, tokenizer, settings, field=field, device=self._team.device, **how)  # type: ignore[arg-type]

    def _together(self, call: str, /, **details: Any) -> AbstractContextManager[None]:
        """On rank 0 a turn of the whole team; elsewhere nothing, since somebody else's turn made us come here."""
        return self._team.turn(call, **({"player": self._field} | details)) if self._team.leads else nullcontext()

    def _optimizer(self) -> torch.optim.Optimizer:
        # no name of a parameter may change: the entry is put around the model for DeepSpeed alone
        self._shapes = {name: p.shape for name, p in self.parameters.items()}
        settings = self.settings
        optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=0.0, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )
        with quietly():
            if self._team.device.type == "cpu":
                os.environ.setdefault("DS_ACCELERATOR", "cpu")
            import deepspeed

            # an operator for inference that no training call reaches: compiling it takes half a minute, and a start
            # that is killed meanwhile leaves a lock on which every later one hangs
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            self._entry = _Entry(self.model).eval()
            self._engine, *_ = deepspeed.initialize(
                model=self._entry,
                model_parameters=list(self.parameters.values()),
                optimizer=optimizer,
                config=engine_config(settings),
                dist_init_required=False,
            )
        self._entry.eval()
        if self._stage == 3:  # the losses read the head outside its module: it is gathered for the whole entry
            for part in (self.head.weight, self.head.bias):
                if part is not None:
                    deepspeed.zero.register_external_parameter(self._entry, part)
        self._shards = Shards(self._engine, self._stage, self.parameters, optimizer, self._team)
        return optimizer

    @property
    def live(self) -> Mapping[str, Tensor]:
        return self._shards.live

    def update_pairs(self, pairs: Sequence[Pair], progress: float) -> Metrics:
        if not pairs:
            return {"pairs": 0.0}
        with self._together("pairs", pairs=[_pair_tree(p) for p in pairs], **self._agreed(progress)):
            return super().update_pairs(pairs, progress)

    def update_groups(self, groups: Sequence[Group], progress: float) -> Metrics:
        if not any(member.weight for group in groups for member in group.members):
            return {"members": 0.0}
        with self._together("groups", groups=[_group_tree(g) for g in groups], **self._agreed(progress)):
            return super().update_groups(groups, progress)

    def _agreed(self, progress: float) -> dict[str, Any]:
        return {"progress": progress, "decided": self.reference.decided}

    def sampler_gap(self, samples: Sequence[Sample]) -> SamplerGap:
        with self._together("gap", samples=[vars(s) for s in samples]):
            return super().sampler_gap(samples)

    def _parts(self, units: Sequence[tuple[Unit, Sequence[Sample]]]) -> list[list[Unit]]:
        limit = self.settings.micro_tokens
        everyones = [
            micro_batches(own, limit, share=self.share)
            for own in shares(units, self._team.size, limit, share=self.share)
        ]
        own = everyones[self._team.rank]
        return own + [[] for _ in range(max(map(len, everyones)) - len(own))]

    def _pack(self, samples: Sequence[Sample], meter: Meter) -> PackedBatch:
        # two: whoever packs pairs needs a pair
        return super()._pack(samples, meter) if samples else pack([FILLER, FILLER], self._team.device)

    def _forward(self, compute: Callable[[], Tensor]) -> Tensor:
        self._entry.compute = compute
        try:
            return self._engine()
        finally:
            self._entry.compute = None

    def _backward(self, loss: Callable[[], Tensor], *, last: bool, filler: bool) -> Tensor:
        self._engine.set_gradient_accumulation_boundary(last)
        value = self._forward(loss)
        # DeepSpeed divides what it sums over the ranks by their number
        self._engine.backward(value * (0.0 if filler else float(self._team.size)))
        return value

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
        return torch.as_tensor(found, device=self._team.device)

    def _totals(self, meter: Meter) -> Metrics:
        values: Metrics = {}
        for own, maxima in self._team.everyones([meter.read(), sorted(meter.maxima)]):
            for name, value in own.items():
                known = values.get(name, value if name in maxima else 0.0)
                values[name] = max(value, known) if name in maxima else known + value
        return values

    def _sum(self, values: Tensor) -> Tensor:
        return self._team.sum(values)

    def _standing_in(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        return self._shards.standing_in(weights)

    def _autocast(self) -> AbstractContextManager[object]:
        return super()._autocast() if self._stage == 0 else nullcontext()  # else the weights are bfloat16 themselves

    @property
    def published(self) -> Mapping[str, Tensor]:
        """Names, shapes and device; no values."""
        empty = torch.zeros((), device=self._team.device)
        return {name: empty.expand(shape) for name, shape in self._shapes.items()}

    @torch.no_grad()
    def publish_into(self, served: Mapping[str, Tensor]) -> None:
        keeps = self._ahead and self.reference.decided != "rollout"
        if self.shadow:
            decay = self._next_decay()
            with self._together("average", decay=decay, keeps=keeps):
                self.average(decay, keeps)
        self.serve_into(served)

    @torch.no_grad()
    def average(self, decay: float, keeps: bool) -> None:
        """Moves this rank's piece of the average; `keeps`: the one before is still referred to."""
        if not keeps:
            self.previous = {}
        for name, old in self.previous.items():
            old.copy_(self.shadow[name])
        live = self.live
        held = [name for name, own in live.items() if own.numel()]
        if held:
            ema_update_([self.shadow[name] for name in held], [live[name] for name in held], decay)

    @torch.no_grad()
    def serve_into(self, served: Mapping[str, Tensor]) -> None:
        dtypes = {served[name].dtype for name in self.parameters}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        for name, whole in self._gathered("shadow" if self.shadow else "live", dtype):
            served[name].copy_(whole)

    def _gathered(self, what: str, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors on rank 0; whoever asks must take them all."""
        with self._together("gather", what=what, dtype=str(dtype).removeprefix("torch.")):
            yield from self._shards.gathered(self.pieces(what), dtype)

    def pieces(self, what: str) -> Mapping[str, Tensor]:
        """This rank's pieces: live, shadow, previous, exp_avg or exp_avg_sq."""
        return self._shards.moments(what) if what in MOMENTS else getattr(self, what)

    @torch.no_grad()
    def whole(self) -> Whole:
        """Gathered into host memory: 16 bytes a parameter on rank 0 while it is saved or loaded."""
        with torch.device("meta"):
            model = type(self.model)(self.model.config)
        model.to_empty(device="cpu").eval()
        model.tie_weights()
        model.generation_config = self.model.generation_config
        own = dict(self.model.named_buffers())
        for name, buffer in model.named_buffers():
            buffer.copy_(own[name])
        parameters = dict(model.named_parameters())
        for name, tensor in self._gathered("live"):
            parameters[name].copy_(tensor)
        optimizer = torch.optim.AdamW(
            parameters.values(),
            lr=self.optimizer.param_groups[0]["lr"],
            betas=self.settings.betas,
            weight_decay=self.settings.weight_decay,
            fused=True,
        )
        if self._shards.steps:
            for parameter in parameters.values():
                optimizer.state[parameter]["step"] = torch.tensor(self._shards.steps)
            for entry in MOMENTS:
                for name, tensor in self._gathered(entry):
                    optimizer.state[parameters[name]][entry] = tensor.cpu().clone()
        shadow, previous = (
            {name: tensor.cpu().clone() for name, tensor in self._gathered(what)} if getattr(self, what) else {}
            for what in ("shadow", "previous")
        )
        return Whole(model, shadow, previous, optimizer)

    @torch.no_grad()
    def take(self, whole: Whole) -> None:
        parameters = dict(whole.model.named_parameters())
        states = [whole.optimizer.state.get(p, {}) for p in parameters.values()]
        steps = max((float(state["step"]) for state in states if state), default=0.0)
        with self._together("take", steps=steps, previous=bool(whole.previous)):
            self.prepare_to_take(steps, bool(whole.previous))
            self._shards.scatter(parameters, self.live)
            self._shards.refresh()
            for entry in MOMENTS if steps else ():
                self._shards.scatter(
                    {n: whole.optimizer.state[p][entry] for n, p in parameters.items()}, self._shards.moments(entry)
                )
            for what in ("shadow", "previous"):
                if getattr(self, what):
                    self._shards.scatter(getattr(whole, what), getattr(self, what))

    @torch.no_grad()
    def prepare_to_take(self, steps: float, previous: bool) -> None:
        self._shards.steps = steps
        if not previous:
            self.previous = {}
        elif not self.previous:
            self.previous = {name: torch.zeros_like(own) for name, own in self.live.items()}

    @torch.no_grad()
    def take_with_the_others(self, steps: float, previous: bool) -> None:
        """The other ranks' part of `take`."""
        self.prepare_to_take(steps, previous)
        self._shards.scatter(None, self.live)
        self._shards.refresh()
        for entry in MOMENTS if steps else ():
            self._shards.scatter(None, self._shards.moments(entry))
        for what in ("shadow", "previous"):
            if getattr(self, what):
                self._shards.scatter(None, getattr(self, what))

    def give(self, what: str, dtype: str) -> None:
        """The other ranks' part of a gather."""
        for _ in self._shards.gathered(self.pieces(what), getattr(torch, dtype)):
            pass


class Followers:
    """The learners of a rank that follows, by player, and what it does when it is told to."""

    def __init__(self, made: Team):
        self._learners: dict[str, DeepSpeedLearner] = {}

    @property
    def calls(self) -> dict[str, Call]:
        return {
            "make": self._make,
            "pairs": lambda m: self._agree(m).update_pairs([_pair(p) for p in m["pairs"]], m["progress"]),
            "groups": lambda m: self._agree(m).update_groups([_group(g) for g in m["groups"]], m["progress"]),
            "gap": lambda m: self._of(m).sampler_gap([_sample(s) for s in m["samples"]]),
            "average": lambda m: self._of(m).average(m["decay"], m["keeps"]),
            "gather": lambda m: self._of(m).give(m["what"], m["dtype"]),
            "take": lambda m: self._of(m).take_with_the_others(m["steps"], m["previous"]),
        }

    def _of(self, message: Mapping[str, Any]) -> DeepSpeedLearner:
        return self._learners[message["player"]]

    def _agree(self, message: Mapping[str, Any]) -> DeepSpeedLearner:
        learner = self._of(message)
        learner.reference.decided = message["decided"]
        return learner

    def _make(self, message: Mapping[str, Any]) -> None:
        player, folder = message["player"], Path(message["folder"])
        self._learners.pop(player, None)  # of the run before, with --seeds
        self._learners[player] = DeepSpeedLearner(
            folder,
            load_tokenizer(folder, player, remote_code=message["remote_code"]),
            LearnSettings.model_validate(message["settings"]),
            field=player,
            lr=message["lr"],
            ema=message["ema"],
            ahead=message["ahead"],
            remote_code=message["remote_code"],
        )


def _sample(tree: Mapping[str, Any]) -> Sample:
    return Sample(**{**tree, "prompt_ids": tuple(tree["prompt_ids"]), "token_ids": tuple(tree["token_ids"]),
                     "logprobs": tuple(tree["logprobs"])})  # fmt: skip


def _pair_tree(pair: Pair) -> dict[str, Any]:
    return {**vars(pair), "chosen": vars(pair.chosen), "rejected": vars(pair.rejected)}


def _group_tree(group: Group) -> dict[str, Any]:
    return {"members": [{**vars(m), "sample": vars(m.sample)} for m in group.members]}


def _pair(tree: Mapping[str, Any]) -> Pair:
    return Pair(**{**tree, "chosen": _sample(tree["chosen"]), "rejected": _sample(tree["rejected"])})


def _group(tree: Mapping[str, Any]) -> Group:
    return Group(tuple(Member(**{**m, "sample": _sample(m["sample"])}) for m in tree["members"]))


@contextmanager
def quietly() -> Iterator[None]:
    """DeepSpeed prints to standard output, from compilers that it starts too; ours is for the run folder."""
    sys.stdout.flush()
    # new names of collectives that DeepSpeed still calls by the old ones
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    kept = os.dup(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)
            _tame(logging.getLogger("DeepSpeed"))


def _tame(logger: logging.Logger) -> None:
    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
