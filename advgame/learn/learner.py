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
from advgame_kernels import PreferenceOutput, ema_decay, ema_update_
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from advgame.errors import InputError
from advgame.game.pairs import Group, Member, Pair
from advgame.game.tree import Sample
from advgame.learn import lora
from advgame.learn.attention import choose_backend, packed_hidden, use_packed_attention
from advgame.learn.compute import checkpoint_layers, compiled_decoder
from advgame.learn.meter import Meter
from advgame.learn.micro import Unit, micro_batches
from advgame.learn.objective import (
    Head,
    PolicyResult,
    TokenTargets,
    coefficient_change,
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
from advgame.learn.reference import ReferenceChoice, snapshot, weights_of
from advgame.learn.settings import LearnSettings
from advgame.publish.capture import PublishPass
from advgame.rollout.chat import first_line

Metrics = dict[str, float]
P = ParamSpec("P")
R = TypeVar("R")


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


@dataclass
class Whole:
    """A player's training state, unsharded, as a checkpoint holds it: model with fp32 master weights, averages by name,
    optimizer. previous may be replaced; whatever has been changed counts once `Learner.take` has it."""

    model: PreTrainedModel
    shadow: dict[str, Tensor]
    previous: dict[str, Tensor]
    optimizer: torch.optim.Optimizer


class Learner:
    """One player in training.

    model: live player, fp32, packed attention. parameters: those that learn, all or the adapters. shadow: their fp32
    EMA by name, empty when the live player samples. initial: what stood in their place before training, kept only where
    an objective refers to it. previous: the average before the last publish, kept only where play runs one step ahead
    and pairs recompute their reference from it. updates: optimiser steps made; averages: steps of the shadow. Updates
    may run in a thread; whoever serves the live player meanwhile waits for the end of one. notes: what a user should
    know of how it trains.
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
    ):
        self.settings = settings
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
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.base_lr = lr or settings.lr
        self.optimizer = self._optimizer()
        self.shadow: dict[str, Tensor] = snapshot(self.live) if ema else {}
        refers = settings.objective in ("grpo", "reinforce") or settings.reference == "initial"
        self.initial: dict[str, Tensor] = {}
        if refers:
            self.initial = snapshot(self.live) if settings.lora is None else lora.disabled(self.model)
        self.recomputes = settings.objective in ("dpo", "ipo") and settings.reference in ("auto", "recompute")
        self.previous: dict[str, Tensor] = snapshot(self.live) if ema and ahead and self.recomputes else {}
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

    def _optimizer(self) -> torch.optim.Optimizer:
        return make_optimizer(self.parameters.values(), self.settings, self.base_lr, self.model.device)

    @property
    def live(self) -> Mapping[str, Tensor]:
        """The fp32 master weights that learn, as this process holds them."""
        return {name: p.data for name, p in self.parameters.items()}

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
        """One optimiser step on `pairs`: gradient = sum over pairs / number of pairs. No pair: no step."""
        if not pairs:
            return {"pairs": 0.0}
        meter = Meter()
        parts = self._parts([(pair, (pair.chosen, pair.rejected)) for pair in pairs])
        batches = [self._pack([s for pair in part for s in (pair.chosen, pair.rejected)], meter) for part in parts]
        references, recomputed = self._pair_references(batches)
        for i, (part, batch, reference) in enumerate(zip(parts, batches, references, strict=True)):
            made: list[PreferenceOutput] = []
            loss = functools.partial(self._pair_loss, batch, reference, len(pairs), made)
            value = self._backward(loss, last=i + 1 == len(parts), filler=not part)
            if not part:
                continue
            (out,) = made
            share = len(part) / len(pairs)
            meter.add("loss", value)
            meter.add("margin", out.margins.mean() * share)
            meter.add("accuracy", out.accuracies.mean() * share)
            if out.entropy is not None:
                meter.add("entropy", out.entropy.mean() * share)
            if recomputed:
                gap = sequence_sums(batch.sampler_logps, batch) - reference
                meter.add("reference_gap", gap.abs().mean() * share)
                meter.most("reference_gap_max", gap.abs().max())
                if self.settings.length_normalised:
                    gap = gap / sequence_lengths(batch)
                shift = gap[0::2] - gap[1::2]
                margins = out.margins.detach()
                meter.most("reference_change", coefficient_change(margins - shift, margins, self.settings))
        meter.most("grad_norm", self._apply(progress))
        values = self._totals(meter)
        if "reference_change" in values and self.reference.decided is None:
            self.reference.measured(values["reference_change"])
        return values | {"pairs": float(len(pairs))}

    def _pair_loss(self, batch: PackedBatch, reference: Tensor, pairs: int, made: list[PreferenceOutput]) -> Tensor:
        """The loss; all that came with it goes into `made`."""
        made.append(preference(self._hidden(batch), self.head, batch, reference, pairs, self.settings))
        return made[-1].loss

    def _group_loss(self, batch: PackedBatch, targets: TokenTargets, made: list[PolicyResult]) -> Tensor:
        """The loss; all that came with it goes into `made`."""
        made.append(policy(self._hidden(batch), self.head, batch, targets, self.settings))
        return made[-1].loss

    def _parts(self, units: Sequence[tuple[Unit, Sequence[Sample]]]) -> list[list[Unit]]:
        """The micro-batches that this process computes. An empty one is a filler: it takes part and adds nothing."""
        return micro_batches(units, self.settings.micro_tokens, share=self.share)

    def _backward(self, loss: Callable[[], Tensor], *, last: bool, filler: bool) -> Tensor:
        """Computes `loss` and adds its gradient to what the coming `_apply` uses; `last`: that comes next."""
        value = loss()
        value.backward()
        return value

    def _totals(self, meter: Meter) -> Metrics:
        return meter.read()

    def _pack(self, samples: Sequence[Sample], meter: Meter) -> PackedBatch:
        batch = pack(samples, self.model.device, share=self.share)
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
        """How far the sampler's log-probs are from these weights' own, on as many samples as one forward takes.

        Called before an update: what sampled is then the average (the live player where there is none), unchanged.
        """
        part, *_ = micro_batches(((s, (s,)) for s in samples), self.settings.micro_tokens)
        batch = pack(part, self.model.device, share=self.share)
        (logps,) = self._reference_logps([batch], self.shadow or self.live)
        gap = sequence_sums(batch.sampler_logps - logps, batch).abs()
        mean, largest = torch.stack([gap.mean(), gap.max()]).tolist()
        return SamplerGap(mean, largest, batch.row_bounds[-1] / batch.sequences)

    @_alone
    def update_groups(self, groups: Sequence[Group], progress: float) -> Metrics:
        """One optimiser step of GRPO or REINFORCE++ on `groups`. No member that learns: no step."""
        # REINFORCE++ normalises over all tokens of the batch, so all tokens weigh the same
        aggregate = "token" if self.settings.objective == "reinforce" else self.settings.aggregate
        weights = chain.from_iterable(member_weights(groups, aggregate))
        members = chain.from_iterable(group.members for group in groups)
        weighted = [(m, w) for m, w in zip(members, weights, strict=True) if w]
        if not weighted:
            return {"members": 0.0}
        meter = Meter()
        parts = self._parts([((m, w), (m.sample,)) for m, w in weighted])
        batches = [self._pack([m.sample for m, _ in part], meter) for part in parts]
        references = self._reference_logps(batches, self.initial)
        advantages = self._advantages(batches, [[m for m, _ in part] for part in parts], references)
        tokens = sum(len(m.sample.token_ids) for m, _ in weighted)
        for i, (part, batch) in enumerate(zip(parts, batches, strict=True)):
            weights_of_part = spread([w for _, w in part] or [0.0] * batch.sequences, batch)
            targets = TokenTargets(advantages[i], weights_of_part, references[i])
            made: list[PolicyResult] = []
            loss = functools.partial(self._group_loss, batch, targets, made)
            value = self._backward(loss, last=i + 1 == len(parts), filler=not part)
            if not part:
                continue
            (out,) = made
            meter.add("loss", value)
            meter.add("kl", out.kl / tokens)
            meter.add("clip_fraction", out.clip_fraction * (batch.row_bounds[-1] / tokens))
        meter.most("grad_norm", self._apply(progress))
        return self._totals(meter) | {"members": float(len(weighted))}

    def _advantages(
        self, batches: Sequence[PackedBatch], members: Sequence[Sequence[Member]], references: Sequence[Tensor]
    ) -> list[Tensor]:
        """By token; zeros for a filler."""
        if self.settings.objective == "reinforce":
            real = [i for i, some in enumerate(members) if some]
            learning = [(batches[i], members[i], references[i]) for i in real]
            made = iter(reinforce_advantages(learning, self.settings.beta, self._sum, self.model.device))
            return [
                next(made) if some else torch.zeros_like(batch.sampler_logps)
                for some, batch in zip(members, batches, strict=True)
            ]
        return [
            spread([m.advantage for m in some] or [0.0] * batch.sequences, batch)
            for some, batch in zip(members, batches, strict=True)
        ]

    def _sum(self, values: Tensor) -> Tensor:
        """The sum over all processes that hold a part of the batch."""
        return values

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
        """Token log-probs of every batch under `weights`, of the kind of `live`."""
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
        """Clips, steps, clears; returns the gradient norm before clipping, on the device."""
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
            source = self.shadow or self.live
            if self.settings.lora is not None:
                for name, weight in lora.merged(self.model, source):
                    served[name].copy_(weight)
                return
            torch._foreach_copy_([served[name] for name in self.parameters], [source[name] for name in self.parameters])

    def whole(self) -> Whole:
        """All that a checkpoint holds of this player."""
        return Whole(self.model, self.shadow, self.previous, self.optimizer)

    def take(self, whole: Whole) -> None:
        """Goes on from `whole`, which `whole()` made and a checkpoint has filled; the settings' own options stay."""
        self.previous = whole.previous
        for group in self.optimizer.param_groups:
            group["betas"], group["weight_decay"] = self.settings.betas, self.settings.weight_decay


def load_model(
    folder: Path, field: str, *, dtype: torch.dtype = torch.float32, remote_code: bool = False
) -> PreTrainedModel:
    """A causal LM from a Hugging Face folder; InputError names `field` if its weights do not load."""
    transformers_logging.disable_progress_bar()  # it would draw over the live view
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=remote_code, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{field}: no weights load from {folder}: {first_line(error)}") from error
    sampling = model.generation_config
    if sampling is not None and not sampling.do_sample and (sampling.temperature or sampling.top_p or sampling.top_k):
        sampling.do_sample = True  # else transformers refuses to save the folder again
    return model
