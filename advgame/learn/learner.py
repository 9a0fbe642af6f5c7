"""The learner of one player: fp32 master weights, fused loss, AdamW, EMA; one update a call."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import torch
from advgame_kernels import ema_decay, ema_update_
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from advgame.errors import InputError
from advgame.game.pairs import Group, Member, Pair
from advgame.game.tree import Sample
from advgame.learn import lora
from advgame.learn.attention import choose_backend, packed_hidden, use_packed_attention
from advgame.learn.compute import checkpoint_layers, compiled_decoder
from advgame.learn.embedding import embed_in_place
from advgame.learn.load import load_model
from advgame.learn.meter import Meter
from advgame.learn.micro import micro_batches
from advgame.learn.objective import (
    Head,
    TokenTargets,
    coefficient_change,
    group_normalizer,
    member_weights,
    policy,
    preference,
    reinforce_advantages,
    sequence_lengths,
    sequence_sums,
    spread,
    token_logps,
)
from advgame.learn.optimizer import clipped_step, make_optimizer
from advgame.learn.packing import PackedBatch, pack
from advgame.learn.ranks import Ranks, filled
from advgame.learn.reference import ReferenceChoice, snapshot, weights_of
from advgame.learn.settings import LearnSettings
from advgame.publish.capture import PublishPass

Metrics = dict[str, float]
P = ParamSpec("P")
R = TypeVar("R")

_SHORT = Sample((0,), (0, 0), (0.0, 0.0), "stop", 0)
FILLER_PAIR = Pair(_SHORT, _SHORT, 0.0, 0.0, "")
FILLER_MEMBER = Member(_SHORT, 0.0, 0.0, 0.0)
"""What a rank computes, at no weight, while others still have micro-batches."""


@dataclass(frozen=True)
class SamplerGap:
    """|sampler − trainer| of summed log-probs, nats a sequence: mean and largest; and the mean length in tokens."""

    mean: float
    largest: float
    tokens: float


def _alone(method: Callable[Concatenate[Learner, P], R]) -> Callable[Concatenate[Learner, P], R]:
    """Holds the learner's lock: inside, live weights change, or the model computes with others in their place."""

    @functools.wraps(method)
    def locked(self: Learner, /, *arguments: P.args, **named: P.kwargs) -> R:
        with self._changing:
            return method(self, *arguments, **named)

    return locked


class Learner:
    """One player in training.

    model: live player, fp32, packed attention. parameters: those that learn, all or the adapters. shadow: their fp32
    EMA by name, empty when the live player samples. initial: what stood in their place before training, kept only where
    an objective refers to it. previous: the average before the last publish, kept only where play runs one step ahead
    and pairs recompute their reference from it. updates: optimiser steps made; averages: steps of the shadow. Updates
    may run in a thread; whoever serves the live player meanwhile waits for the end of one. ranks: who trains this
    player together, each on data of its own; all of them make every update. notes: what a user should know of how it
    trains.
    """

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
        self.settings = settings
        self.ranks = ranks or Ranks()
        self.tokenizer = tokenizer
        made = source if isinstance(source, PreTrainedModel) else load_model(source, field, remote_code=remote_code)
        self.model: PreTrainedModel = made.to(device)
        # eval: dropout would differ between policy and reference pass, and draw from a stream no checkpoint holds
        self.model.eval()
        self._layout = choose_backend(settings.attention, self.model.device, self._dtype)
        unshared = use_packed_attention(self.model, field, self._layout, self._dtype)
        self.share = settings.share_prefixes == "auto" and unshared is None
        self.notes = [unshared] if unshared is not None and settings.share_prefixes == "auto" else []
        self._head_checked(field)
        if settings.checkpointing:
            checkpoint_layers(self.model, field)
        self._decoder = compiled_decoder(self.model) if settings.compile else None
        if settings.lora is not None:
            lora.add_adapters(self.model, settings.lora, field)
        if not settings.compile:
            embed_in_place(self.model)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.shadow: dict[str, Tensor] = snapshot(self.parameters) if ema else {}
        refers = settings.objective in ("grpo", "reinforce") or settings.reference == "initial"
        self.initial: dict[str, Tensor] = {}
        if refers:
            self.initial = snapshot(self.parameters) if settings.lora is None else lora.disabled(self.model)
        self.recomputes = settings.objective in ("dpo", "ipo") and settings.reference in ("auto", "recompute")
        self.previous: dict[str, Tensor] = snapshot(self.parameters) if ema and ahead and self.recomputes else {}
        self.base_lr = lr or settings.lr
        self.optimizer = make_optimizer(self.parameters.values(), settings, self.base_lr, self.model.device)
        self.reference = ReferenceChoice(settings.reference, settings.reference_tolerance)
        self.updates = 0
        self.averages = 0
        self._publish = PublishPass()
        self._ahead = ahead
        self._changing = threading.Lock()

    def _head_checked(self, field: str) -> None:
        config = self.model.config.get_text_config()
        for name in ("logit_scale", "logits_scaling"):
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise InputError(f"{field}: {type(self.model).__name__} scales its logits ({name}); not supported")

    @property
    def head(self) -> Head:
        """The head's fp32 master weights; the losses compute in the type of the hidden states and keep dWeight fp32."""
        output = self.model.get_output_embeddings()
        softcap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None) or 0.0
        return Head(output.weight, getattr(output, "bias", None), softcap)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.settings.dtype == "bfloat16" else torch.float32

    def lr_at(self, progress: float) -> float:
        """Cosine from the base rate to `lr_final` of it; `progress` in [0, 1]."""
        floor = self.settings.lr_final
        return self.base_lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))

    @_alone
    def update_pairs(self, pairs: Sequence[Pair], progress: float) -> Metrics:
        """One optimiser step on all ranks' `pairs`: gradient = sum over pairs / number of pairs. No pair: no step."""
        total = int(self.ranks.sum(len(pairs)))
        if not total:
            return {"pairs": 0.0}
        meter = Meter()
        units = ((pair, (pair.chosen, pair.rejected)) for pair in pairs)
        parts = micro_batches(units, self.settings.micro_tokens, share=self.share)
        for part, real in filled(parts, [FILLER_PAIR], self.ranks):
            batch = self._pack([s for pair in part for s in (pair.chosen, pair.rejected)], meter if real else Meter())
            sampled = sequence_sums(batch.sampler_logps, batch)
            reference, recomputed = self._pair_reference(batch, sampled)
            out = preference(self._hidden(batch), self.head, batch, reference, total, self.settings)
            if not real:
                (out.loss * 0.0).backward()
                continue
            out.loss.backward()
            share = len(part) / total
            meter.add("loss", out.loss)
            meter.add("margin", out.margins.mean() * share)
            meter.add("accuracy", out.accuracies.mean() * share)
            if out.entropy is not None:
                meter.add("entropy", out.entropy.mean() * share)
            if recomputed:
                gap = sampled - reference
                meter.add("reference_gap", gap.abs().mean() * share)
                meter.most("reference_gap_max", gap.abs().max())
                if self.settings.length_normalised:
                    gap = gap / sequence_lengths(batch)
                shift = gap[0::2] - gap[1::2]
                margins = out.margins.detach()
                meter.most("reference_change", coefficient_change(margins - shift, margins, self.settings))
        meter.most("grad_norm", self._apply(progress))
        values = meter.read(self.ranks)
        if "reference_change" in values and self.reference.decided is None:
            self.reference.measured(values["reference_change"])
        return values | {"pairs": float(total)}

    def _pack(self, samples: Sequence[Sample], meter: Meter) -> PackedBatch:
        batch = pack(samples, self.model.device, share=self.share)
        meter.add("tokens", float(batch.tokens))
        meter.add("tokens_saved", float(batch.unshared - batch.tokens))
        return batch

    def _pair_reference(self, batch: PackedBatch, sampled: Tensor) -> tuple[Tensor, bool]:
        """Reference log-probs by sequence, and whether they were recomputed from the sampler's own weights."""
        if self.reference.decided == "rollout":
            return sampled, False
        initial = self.reference.decided == "initial"
        # the reference is the version that sampled
        logps = self._reference_logps(batch, self.initial if initial else self.previous or self.shadow)
        return sequence_sums(logps, batch), not initial

    @_alone
    def sampler_gap(self, samples: Sequence[Sample]) -> SamplerGap:
        """How far the sampler's log-probs are from these weights' own, on as many samples as one forward takes.

        Called before an update: what sampled is then the average (the live player where there is none), unchanged.
        """
        part, *_ = micro_batches(((s, (s,)) for s in samples), self.settings.micro_tokens)
        batch = pack(part, self.model.device, share=self.share)
        weights = self.shadow or {name: p.data for name, p in self.parameters.items()}
        gap = sequence_sums(batch.sampler_logps - self._reference_logps(batch, weights), batch).abs()
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
        parts: list[tuple[PackedBatch, list[Member], list[float], Tensor]] = []
        meter = Meter()
        units = (((m, w), (m.sample,)) for m, w in weighted)
        batches = micro_batches(units, self.settings.micro_tokens, share=self.share)
        for part, real in filled(batches, [(FILLER_MEMBER, 0.0)], self.ranks):
            batch = self._pack([m.sample for m, _ in part], meter if real else Meter())
            row_weights = [w for _, w in part]
            parts.append((batch, [m for m, _ in part], row_weights, self._reference_logps(batch, self.initial)))
        real_parts = parts[: len(batches)]
        advantages = self._advantages(real_parts)
        advantages += [torch.zeros_like(batch.sampler_logps) for batch, *_ in parts[len(batches) :]]
        tokens = self.ranks.sum(sum(batch.row_bounds[-1] for batch, *_ in real_parts))
        for number, ((batch, _, row_weights, reference), advantage) in enumerate(zip(parts, advantages, strict=True)):
            targets = TokenTargets(advantage, spread(row_weights, batch), reference)
            out = policy(self._hidden(batch), self.head, batch, targets, self.settings)
            out.loss.backward()
            if number < len(batches):
                meter.add("loss", out.loss)
                meter.add("kl", out.kl / tokens)
                meter.add("clip_fraction", out.clip_fraction * (batch.row_bounds[-1] / tokens))
        meter.most("grad_norm", self._apply(progress))
        return meter.read(self.ranks) | {"members": float(learning)}

    def _advantages(self, parts: Sequence[tuple[PackedBatch, list[Member], list[float], Tensor]]) -> list[Tensor]:
        if self.settings.objective == "reinforce":
            own = [(batch, members, reference) for batch, members, _, reference in parts]
            return reinforce_advantages(own, self.settings.beta, self.ranks, self.model.device)
        return [spread([m.advantage for m in members], batch) for batch, members, *_ in parts]

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
    def _reference_logps(self, batch: PackedBatch, tensors: Mapping[str, Tensor]) -> Tensor:
        with weights_of(self.model, tensors):
            return token_logps(self._hidden(batch), self.head, batch).logps

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
        """Tensors of the names and shapes that `publish_into` and `serve_into` write: those of a plain model."""
        return self.parameters if self.settings.lora is None else lora.plain_parameters(self.model)

    @torch.no_grad()
    def publish_into(self, served: Mapping[str, Tensor]) -> None:
        """Moves the EMA one step and writes it into an engine's tensors in the same pass (live player: a copy)."""
        if self.reference.decided == "rollout" or not self._ahead:
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

    def _next_decay(self) -> float:
        """Counts an update of the shadow and returns its decay."""
        self.averages += 1
        how = self.settings
        return ema_decay(how.ema_schedule, self.averages, decay=how.ema_decay, gamma=how.ema_gamma)

    @torch.no_grad()
    def serve_into(self, served: Mapping[str, Tensor]) -> None:
        """Writes the weights that sample, as they are, into an engine's tensors (a resumed run's first publish)."""
        with nullcontext() if self.shadow else self._changing:  # an engine may be restarted while this player learns
            source = self.shadow or {name: p.data for name, p in self.parameters.items()}
            if self.settings.lora is not None:
                for name, weight in lora.merged(self.model, source):
                    served[name].copy_(weight)
                return
            torch._foreach_copy_([served[name] for name in self.parameters], [source[name] for name in self.parameters])
