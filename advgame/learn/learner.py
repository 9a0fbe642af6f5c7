"""The learner of one player: fp32 master weights, fused loss, AdamW, EMA; one update a call."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import torch
from advgame_kernels import PreferenceOutput, ema_update_
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from advgame.game.pairs import Group, Member, Pair
from advgame.game.tree import Sample
from advgame.learn import lora
from advgame.learn.attention import choose_backend, packed_hidden, use_packed_attention
from advgame.learn.compute import checkpoint_layers, compiled_decoder
from advgame.learn.embedding import embed_in_place
from advgame.learn.load import load_model
from advgame.learn.measures import measure_pairs, measure_reference
from advgame.learn.meter import Meter
from advgame.learn.micro import FILLER_MEMBER, FILLER_PAIR, micro_batches
from advgame.learn.objective import (
    Head,
    PolicyResult,
    TokenTargets,
    check_head,
    group_normalizer,
    member_weights,
    policy,
    preference,
    reinforce_advantages,
    sequence_sums,
    spread,
    token_logps,
)
from advgame.learn.optimizer import clipped_step, make_optimizer
from advgame.learn.packing import PackedBatch, pack
from advgame.learn.ranks import Ranks, filled
from advgame.learn.reference import snapshot, weights_of
from advgame.learn.settings import LearnSettings
from advgame.learn.trainer import Metrics, SamplerGap, Trainer, Whole
from advgame.publish.capture import PublishPass

P = ParamSpec("P")
R = TypeVar("R")
Out = TypeVar("Out", PreferenceOutput, PolicyResult)


def _alone(method: Callable[Concatenate[Learner, P], R]) -> Callable[Concatenate[Learner, P], R]:
    """Holds the learner's lock: inside, live weights change, or the model computes with others in their place."""

    @functools.wraps(method)
    def locked(self: Learner, /, *arguments: P.args, **named: P.kwargs) -> R:
        with self._changing:
            return method(self, *arguments, **named)

    return locked


class Learner(Trainer):
    """A player that trains in this process.

    model: live player, fp32, packed attention. parameters: those that learn, all or the adapters. shadow: their fp32
    EMA by name, empty when the live player samples. initial: what stood in their place before training, kept only where
    an objective refers to it. previous: the average before the last publish, kept only where play runs one step ahead
    and pairs recompute their reference from it. Updates may run in a thread; whoever serves the live player meanwhile
    waits for the end of one. ranks: who trains this player together, each on data of its own; all of them make every
    update.
    """

    _in_place = True
    """Gradients add up in `grad` and nobody hooks them."""

    def __init__(
        self,
        source: Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: LearnSettings,
        *,
        field: str,
        lr: float | None = None,
        ema: bool = True,
        ahead: bool = False,
        device: torch.device | str = "cpu",
        remote_code: bool = False,
        ranks: Ranks | None = None,
    ):
        super().__init__(tokenizer, settings, lr=lr, ema=ema, ahead=ahead)
        self.ranks = ranks or Ranks()
        made = source if isinstance(source, PreTrainedModel) else load_model(source, field, remote_code=remote_code)
        self.model: PreTrainedModel = made.to(device)
        # eval: dropout would differ between policy and reference pass, and draw from a stream no checkpoint holds
        self.model.eval()
        self._layout = choose_backend(settings.attention, self.model.device, self._dtype)
        unshared = use_packed_attention(self.model, field, self._layout, self._dtype)
        self.share = settings.share_prefixes == "auto" and unshared is None
        if unshared is not None and settings.share_prefixes == "auto":
            self.notes.append(unshared)
        check_head(self.model, field)
        if settings.checkpointing:
            checkpoint_layers(self.model, field)
        self._decoder = compiled_decoder(self.model) if settings.compile else None
        if settings.lora is not None:
            lora.add_adapters(self.model, settings.lora, field)
        if self._in_place and not settings.compile:
            embed_in_place(self.model)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = self._made_optimizer()
        self.shadow: dict[str, Tensor] = snapshot(self.live) if ema else {}
        refers = settings.objective in ("grpo", "reinforce") or settings.reference == "initial"
        self.initial: dict[str, Tensor] = {}
        if refers:
            self.initial = snapshot(self.live) if settings.lora is None else lora.disabled(self.model)
        self.previous: dict[str, Tensor] = snapshot(self.live) if ema and ahead and self.recomputes else {}
        self._publish = PublishPass()
        self._changing = threading.Lock()

    def _made_optimizer(self) -> torch.optim.Optimizer:
        return make_optimizer(self.parameters.values(), self.settings, self.base_lr, self.model.device)

    @property
    def live(self) -> Mapping[str, Tensor]:
        """The fp32 master weights that learn, as this process holds them."""
        return {name: p.data for name, p in self.parameters.items()}

    @property
    def head(self) -> Head:
        """The head's fp32 master weights; the losses compute in the type of the hidden states and keep dWeight fp32."""
        return Head.of(self.model)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.settings.dtype == "bfloat16" else torch.float32

    @_alone
    def update_pairs(self, pairs: Sequence[Pair], progress: float) -> Metrics:
        """One optimiser step on all ranks' `pairs`: gradient = sum over pairs / number of pairs. No pair: no step."""
        total = int(self.ranks.sum(len(pairs)))
        if not total:
            return {"pairs": 0.0}
        meter = Meter()
        units = ((pair, (pair.chosen, pair.rejected)) for pair in pairs)
        own = micro_batches(units, self.settings.micro_tokens, share=self.share)
        parts = list(filled(own, [FILLER_PAIR], self.ranks))
        batches = [self._pack([s for p in part for s in (p.chosen, p.rejected)], meter, real) for part, real in parts]
        references, recomputed = self._pair_references(batches)
        for i, ((part, real), batch, reference) in enumerate(zip(parts, batches, references, strict=True)):
            loss = functools.partial(self._pair_loss, batch, reference, total)
            out = self._backward(loss, real=real, last=i + 1 == len(parts))
            if real:
                measure_pairs(meter, out, len(part) / total)
                if recomputed:
                    measure_reference(meter, out.margins, batch, reference, len(part) / total, self.settings)
        meter.most("grad_norm", self._apply(progress))
        values = meter.read(self.ranks)
        self._measured(values)
        return values | {"pairs": float(total)}

    def _pair_loss(self, batch: PackedBatch, reference: Tensor, total: int) -> PreferenceOutput:
        return preference(self._hidden(batch), self.head, batch, reference, total, self.settings)

    def _backward(self, compute: Callable[[], Out], *, real: bool, last: bool) -> Out:
        """Computes a loss and adds its gradient (zero unless `real`) to the update's; `last`: `_apply` comes next."""
        out = compute()
        (out.loss if real else out.loss * 0.0).backward()
        return out

    def _pack(self, samples: Sequence[Sample], meter: Meter, real: bool = True) -> PackedBatch:
        batch = pack(samples, self.model.device, share=self.share)
        if real:
            meter.add("tokens", float(batch.tokens))
            meter.add("tokens_saved", float(batch.unshared - batch.tokens))
        return batch

    def _pair_references(self, batches: Sequence[PackedBatch]) -> tuple[list[Tensor], bool]:
        """Reference log-probs by sequence, and whether they were recomputed from the sampler's own weights."""
        if self.reference.decided == "rollout":
            return [sequence_sums(batch.sampler_logps, batch) for batch in batches], False
        initial = self.reference.decided == "initial"
        # the reference is the version that sampled
        logps = self._reference_logps(batches, self.initial if initial else self.previous or self.shadow)
        return [sequence_sums(own, batch) for own, batch in zip(logps, batches, strict=True)], not initial

    @_alone
    def sampler_gap(self, samples: Sequence[Sample]) -> SamplerGap:
        part, *_ = micro_batches(((s, (s,)) for s in samples), self.settings.micro_tokens)
        batch = pack(part, self.model.device, share=self.share)
        (logps,) = self._reference_logps([batch], self.shadow or self.live)
        gap = sequence_sums(batch.sampler_logps - logps, batch).abs()
        mean, largest = torch.stack([gap.mean(), gap.max()]).tolist()
        return SamplerGap(mean, largest, batch.row_bounds[-1] / batch.sequences)

    @_alone
    def update_groups(self, groups: Sequence[Group], progress: float) -> Metrics:
        """One optimiser step of GRPO or REINFORCE++ on `groups`, those of all ranks. No member that learns: no step."""
        # REINFORCE++ normalises over all tokens of the batch, so all tokens weigh the same
        aggregate = "token" if self.settings.objective == "reinforce" else self.settings.aggregate
        normalizer = self.ranks.sum(group_normalizer(groups, aggregate))
        weights = chain.from_iterable(member_weights(groups, aggregate, normalizer))
        members = chain.from_iterable(group.members for group in groups)
        weighted = [(m, w) for m, w in zip(members, weights, strict=True) if w]
        learning = int(self.ranks.sum(len(weighted)))
        if not learning:
            return {"members": 0.0}
        meter = Meter()
        own = micro_batches((((m, w), (m.sample,)) for m, w in weighted), self.settings.micro_tokens, share=self.share)
        parts = list(filled(own, [(FILLER_MEMBER, 0.0)], self.ranks))
        batches = [self._pack([m.sample for m, _ in part], meter, real) for part, real in parts]
        references = self._reference_logps(batches, self.initial)
        advantages = self._advantages([[m for m, _ in part] for part, _ in parts], batches, references, len(own))
        tokens = self.ranks.sum(sum(batch.row_bounds[-1] for batch in batches[: len(own)]))
        for i, ((part, real), batch) in enumerate(zip(parts, batches, strict=True)):
            targets = TokenTargets(advantages[i], spread([w for _, w in part], batch), references[i])
            loss = functools.partial(self._group_loss, batch, targets)
            out = self._backward(loss, real=real, last=i + 1 == len(parts))
            if real:
                meter.add("loss", out.loss)
                meter.add("kl", out.kl / tokens)
                meter.add("clip_fraction", out.clip_fraction * (batch.row_bounds[-1] / tokens))
        meter.most("grad_norm", self._apply(progress))
        return meter.read(self.ranks) | {"members": float(learning)}

    def _group_loss(self, batch: PackedBatch, targets: TokenTargets) -> PolicyResult:
        return policy(self._hidden(batch), self.head, batch, targets, self.settings)

    def _advantages(
        self, members: list[list[Member]], batches: list[PackedBatch], references: list[Tensor], real: int
    ) -> list[Tensor]:
        """By token; the batches after the first `real` ones are fillers and have none."""
        if self.settings.objective != "reinforce":
            return [spread([m.advantage for m in some], batch) for some, batch in zip(members, batches, strict=True)]
        own = list(zip(batches, members, references, strict=True))[:real]
        made = reinforce_advantages(own, self.settings.beta, self.ranks, self.model.device)
        return made + [torch.zeros_like(batch.sampler_logps) for batch in batches[real:]]

    def _hidden(self, batch: PackedBatch) -> Tensor:
        """Hidden states of the response rows, in the compute type."""
        with self._autocast():
            hidden = packed_hidden(self.model, batch, self._layout, self._decoder)
        return hidden.to(self._dtype)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.settings.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.model.device.type, self._dtype)

    @torch.no_grad()
    def _reference_logps(self, batches: Sequence[PackedBatch], weights: Mapping[str, Tensor]) -> list[Tensor]:
        """Token log-probs of every batch under `weights`, which are of the kind of `live`."""
        with self._standing_in(weights):
            return [self._forward(functools.partial(self._token_logps, batch)) for batch in batches]

    def _standing_in(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Inside, the model computes with `weights` in its own weights' place."""
        return weights_of(self.model, weights)

    def _token_logps(self, batch: PackedBatch) -> Tensor:
        return token_logps(self._hidden(batch), self.head, batch).logps

    def _forward(self, compute: Callable[[], Tensor]) -> Tensor:
        return compute()

    def _apply(self, progress: float) -> Tensor:
        """Adds up the ranks' gradients, clips, steps, clears; returns the norm before clipping, on the device."""
        self.ranks.add_up([p.grad for p in self.parameters.values() if p.grad is not None])
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(progress)
        norm = clipped_step(self.optimizer, self.settings.clip_norm)
        self.updates += 1
        return norm

    @property
    def published(self) -> Mapping[str, Tensor]:
        return self.parameters if self.settings.lora is None else lora.plain_parameters(self.model)

    @torch.no_grad()
    def publish_into(self, served: Mapping[str, Tensor]) -> None:
        """The average moves and is written in one pass."""
        if not self._keeps_previous:
            self.previous = {}
        if self.previous:
            torch._foreach_copy_(list(self.previous.values()), [self.shadow[name] for name in self.previous])
        if not self.shadow:
            self.serve_into(served)
        elif self.settings.lora is None:
            self._publish(self.shadow, self.parameters, served, self._next_decay())
        else:
            live = [p.data for p in self.parameters.values()]
            ema_update_([self.shadow[name] for name in self.parameters], live, self._next_decay())
            self.serve_into(served)

    @torch.no_grad()
    def serve_into(self, served: Mapping[str, Tensor]) -> None:
        with nullcontext() if self.shadow else self._changing:  # an engine may be restarted while this player learns
            source = self.shadow or self.live
            if self.settings.lora is not None:
                for name, weight in lora.merged(self.model, source):
                    served[name].copy_(weight)
                return
            torch._foreach_copy_([served[name] for name in self.parameters], [source[name] for name in self.parameters])

    def whole(self) -> Whole:
        return Whole(self.model, self.shadow, self.previous, self.optimizer)

    def take(self, whole: Whole) -> None:
        self.previous = whole.previous
        for group in self.optimizer.param_groups:
            group["betas"], group["weight_decay"] = self.settings.betas, self.settings.weight_decay
