"""One training step of a player, from the published way to ours, one change after another.

The published way (docs/step.md): right-padded batches with an attention mask; full forwards of the player, of
the frozen initial model and of the moving average; all logits of all rows of each; the prompt once for the chosen
and once more for the rejected completion; clipping, AdamW, moving average and its bf16 copy one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from advgame_kernels import linear_logprobs, linear_preference_loss
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from advgame.config import LearnSettings
from advgame.game.pairs import Pair
from advgame.game.tree import Sample
from advgame.learn.attention import packed_hidden
from advgame.learn.learner import Learner
from advgame.learn.micro import packed_tokens
from advgame.learn.packing import PackedBatch, pack
from advgame.learn.reference import weights_of


@dataclass(frozen=True)
class Way:
    """What a step does, and in how many pieces."""

    frozen_forward: bool = True  # the initial model's log-probs, which the loss does not read
    packed: bool = False
    response_rows: bool = False  # only they reach the LM head
    fused_loss: bool = False  # logits in chunks, gradients with them
    shared: bool = False  # the prompt of a pair once
    rollout: bool = False  # the sampler's log-probs are the reference
    embedding_rows: bool = False  # the embedding's gradient in place
    micro_pairs: int | None = None  # pairs of one forward; None: all


def _one_after_another() -> dict[str, Way | None]:
    way = Way()
    made: dict[str, Way | None] = {"published": way}
    for name, change in (
        ("no frozen forward", {"frozen_forward": False}),
        ("packed", {"packed": True}),
        ("response rows only", {"response_rows": True}),
        ("fused loss", {"fused_loss": True}),
        ("shared prompts", {"shared": True}),
        ("rollout reference", {"rollout": True}),
        ("embedding in place", {"embedding_rows": True}),
    ):
        way = replace(way, **change)  # type: ignore[arg-type]
        made[name] = way
    made["ours"] = None  # and one norm pass, moving average and copy in one pass: the learner itself
    made[PUBLISHED_PARTS] = Way(micro_pairs=2)
    return made


PUBLISHED_PARTS = "published, 2 pairs at a time"
WAYS = _one_after_another()


def learner_of(model: PreTrainedModel, dtype: str) -> Learner:
    """The player's learner; its moving average stands a little off the player, as in training."""
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    settings = LearnSettings(reference="rollout", dtype=dtype, micro_tokens=1 << 20)  # type: ignore[arg-type]
    learner = Learner(model, words, settings, field="model", device=model.device)
    generator = torch.Generator(model.device).manual_seed(1)
    for average in learner.shadow.values():
        noise = torch.randn(average.shape, generator=generator, device=average.device)
        average.add_(noise.mul_(1e-4))
    return learner


class Contender:
    """One way of making a step, with the state that it keeps between steps.

    at_once: pairs of one forward and backward, None: as the way says; our own step takes their share of the tokens.
    """

    def __init__(self, name: str, model: PreTrainedModel, dtype: str):
        self.way = WAYS[name]
        self.at_once: int | None = self.way.micro_pairs if self.way is not None else None
        plain = model.config._attn_implementation
        self.learner = learner_of(model, dtype)
        if self.way is not None and not self.way.packed:
            model.set_attn_implementation(plain)
        if self.way is not None and not self.way.embedding_rows:
            vars(model.get_input_embeddings()).pop("forward", None)  # the learner's own; the class's comes back
        self.model, self.settings = model, self.learner.settings
        self.initial = {n: p.detach().clone() for n, p in model.named_parameters()} if self._reads_initial else {}
        self.served = {n: torch.zeros_like(p, dtype=torch.bfloat16).fill_(1) for n, p in model.named_parameters()}

    @property
    def _reads_initial(self) -> bool:
        return self.way is not None and self.way.frozen_forward

    def gradients(self, pairs: Sequence[Pair]) -> Mapping[str, Tensor]:
        """The gradients of a step, left in the parameters."""
        if self.way is None:
            apply, self.learner._apply = self.learner._apply, _no_step  # type: ignore[method-assign]
            try:
                self._update(pairs)
            finally:
                self.learner._apply = apply  # type: ignore[method-assign]
        else:
            self._backward(self.way, pairs)
        return {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}

    def forget(self) -> None:
        """Drops gradients, and what the allocator keeps of a batch."""
        self.learner.optimizer.zero_grad(set_to_none=True)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def warm_optimizer(self) -> None:
        """Makes the moments exist without moving a weight."""
        optimizer = self.learner.optimizer
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            group["lr"] = self.settings.lr

    def step(self, pairs: Sequence[Pair]) -> None:
        """Gradients, clipping, AdamW, moving average, bf16 copy."""
        if self.way is None:
            self._update(pairs)
            self.learner.publish_into(self.served)
            return
        self._backward(self.way, pairs)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm).item()
        self.learner.optimizer.step()
        self.learner.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                average = self.learner.shadow[name]
                average.mul_(self.settings.ema_decay).add_(parameter, alpha=1 - self.settings.ema_decay)
                self.served[name].copy_(average)

    def _update(self, pairs: Sequence[Pair]) -> None:
        if self.at_once is not None:
            # a batch's tokens in as many parts as its pairs would make
            tokens = packed_tokens([s for pair in pairs for s in (pair.chosen, pair.rejected)], self.learner.share)
            limit = -(-tokens * self.at_once // len(pairs))
            self.learner.settings = self.settings.model_copy(update={"micro_tokens": limit})
        self.learner.update_pairs(pairs, 0.0)

    def _backward(self, way: Way, pairs: Sequence[Pair]) -> None:
        size = self.at_once or len(pairs)
        for first in range(0, len(pairs), size):
            samples = [s for pair in pairs[first : first + size] for s in (pair.chosen, pair.rejected)]
            forward = _packed_forward(way, samples, self.learner) if way.packed else _padded_forward(samples, self)
            if way.frozen_forward:
                with torch.no_grad(), weights_of(self.model, self.initial):
                    forward.logps()  # a metric: how far the player has gone
            if way.rollout:
                reference = torch.tensor([sum(s.logprobs) for s in samples], device=self.model.device)
            else:
                with torch.no_grad(), weights_of(self.model, self.learner.shadow):
                    reference = forward.logps()
            forward.loss(reference, self.settings.beta, len(pairs)).backward()


def _no_step(progress: float) -> Tensor:
    return torch.zeros(())


@dataclass(frozen=True)
class Forward:
    """A batch's summed log-probs (sequences,) under the model's present weights, and the loss on a reference."""

    logps: Callable[[], Tensor]
    fused: Callable[[Tensor, float, int], Tensor] | None = None

    def loss(self, reference: Tensor, beta: float, pairs: int) -> Tensor:
        if self.fused is not None:
            return self.fused(reference, beta, pairs)
        ratios = self.logps() - reference
        return -F.logsigmoid(beta * (ratios[0::2] - ratios[1::2])).sum() / pairs


def _padded_forward(samples: Sequence[Sample], contender: Contender) -> Forward:
    model, device = contender.model, contender.model.device
    longest = max(len(s.prompt_ids) + len(s.token_ids) for s in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    attended, learned = torch.zeros_like(ids), torch.zeros(len(samples), longest - 1)
    for i, s in enumerate(samples):
        whole = (*s.prompt_ids, *s.token_ids)
        ids[i, : len(whole)] = torch.tensor(whole)
        attended[i, : len(whole)] = 1
        learned[i, len(s.prompt_ids) - 1 : len(whole) - 1] = 1.0
    ids, attended, learned = ids.to(device), attended.to(device), learned.to(device)

    def logps() -> Tensor:
        with contender.learner._autocast():
            logits = model(input_ids=ids, attention_mask=attended, use_cache=False).logits
        chosen = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        return (chosen * learned).sum(-1)

    return Forward(logps)


def _packed_forward(way: Way, samples: Sequence[Sample], learner: Learner) -> Forward:
    model = learner.model
    batch = pack(samples, model.device, share=way.shared)
    everything = replace(batch, rows=torch.arange(batch.tokens, device=model.device))

    def hidden(of: PackedBatch) -> Tensor:
        with learner._autocast():
            return packed_hidden(model, of, learner._layout).to(learner._dtype)

    def logps() -> Tensor:
        if way.fused_loss:
            values = linear_logprobs(hidden(batch), learner.head.weight, batch.labels).logps
        else:
            rows = hidden(batch if way.response_rows else everything)
            logits = (rows @ learner.head.weight.to(rows.dtype).T).float().log_softmax(-1)
            if not way.response_rows:
                logits = logits[batch.rows]
            values = logits.gather(-1, batch.labels.unsqueeze(-1)).squeeze(-1)
        return torch.stack([values[a:b].sum() for a, b in pairwise(batch.row_bounds)])

    def fused(reference: Tensor, beta: float, pairs: int) -> Tensor:
        weight = learner.head.weight
        made = linear_preference_loss(
            hidden(batch), weight, batch.labels, batch.row_bounds, reference, beta=beta, normalizer=pairs
        )
        return made.loss

    return Forward(logps, fused if way.fused_loss else None)
