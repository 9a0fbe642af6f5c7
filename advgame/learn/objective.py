"""From pairs or groups to a loss: the game's objectives over the kernel library's public functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from advgame_kernels import LogProbs, PreferenceOutput, linear_logprobs, linear_policy_loss, linear_preference_loss
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from advgame.errors import InputError
from advgame.game.pairs import Group, Member
from advgame.learn.packing import PackedBatch, to_device
from advgame.learn.ranks import Ranks
from advgame.learn.settings import LearnSettings

PREFERENCE_KINDS = {"dpo": "sigmoid", "ipo": "ipo"}


@dataclass(frozen=True)
class Head:
    """The language-model head as the kernel library wants it."""

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None
    softcap: float

    @classmethod
    def of(cls, model: PreTrainedModel) -> Head:
        """The model's own output embeddings, not copied."""
        output = model.get_output_embeddings()
        softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None) or 0.0
        return cls(output.weight, getattr(output, "bias", None), softcap)


def check_head(model: PreTrainedModel, field: str) -> None:
    """Raises InputError, naming `field`, for a model whose logits the losses do not compute."""
    config = model.config.get_text_config()
    for name in ("logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise InputError(f"{field}: {type(model).__name__} scales its logits ({name}); not supported")


def preference(
    hidden: Float[Tensor, "rows hidden"],
    head: Head,
    batch: PackedBatch,
    reference: Float[Tensor, " sequences"],
    normalizer: int,
    settings: LearnSettings,
) -> PreferenceOutput:
    """DPO or IPO on summed log-probs; sequences of `batch` are chosen, rejected, chosen, rejected ..."""
    return linear_preference_loss(
        hidden,
        head.weight,
        batch.labels,
        batch.row_bounds,
        reference,
        kind=PREFERENCE_KINDS[settings.objective],
        beta=settings.beta,
        average=settings.length_normalised,
        nll_weight=settings.nll_weight,
        entropy_weight=settings.entropy_weight,
        normalizer=normalizer,
        bias=head.bias,
        softcap=head.softcap,
    )


def token_logps(hidden: Float[Tensor, "rows hidden"], head: Head, batch: PackedBatch) -> LogProbs:
    return linear_logprobs(hidden, head.weight, batch.labels, bias=head.bias, softcap=head.softcap)


def sequence_lengths(batch: PackedBatch) -> Int[Tensor, " sequences"]:
    return to_device(torch.tensor(batch.row_bounds).diff(), batch.labels.device)


def sequence_sums(values: Float[Tensor, " rows"], batch: PackedBatch) -> Float[Tensor, " sequences"]:
    """Sums of token values over each sequence."""
    return torch.zeros(batch.sequences, dtype=values.dtype, device=values.device).index_add_(0, batch.owner, values)


def coefficient_change(
    rollout: Float[Tensor, " pairs"], recomputed: Float[Tensor, " pairs"], settings: LearnSettings
) -> Float[Tensor, ""]:
    """How much the per-pair gradient coefficient moves if margins use the sampler's reference log-probs.

    The coefficient is the derivative of the pair's loss by its margin h: beta * sigmoid(-beta h) for DPO,
    2 (h - 1/(2 beta)) for IPO. Returned is the 95th percentile of its change over its mean size.
    """

    def coefficient(h: Tensor) -> Tensor:
        if settings.objective == "ipo":
            return 2 * (h - 1 / (2 * settings.beta))
        return settings.beta * torch.sigmoid(-settings.beta * h)

    old, new = coefficient(recomputed), coefficient(rollout)
    return torch.quantile((new - old).abs() / old.abs().mean(), 0.95)


@dataclass(frozen=True)
class TokenTargets:
    """What a policy objective needs a token: its advantage, its weight in the loss, the reference's log-prob."""

    advantages: Float[Tensor, " rows"]
    weights: Float[Tensor, " rows"]
    reference: Float[Tensor, " rows"]


def spread(values: Sequence[float], batch: PackedBatch) -> Float[Tensor, " rows"]:
    """One value a sequence -> one a token."""
    return to_device(torch.tensor(values, dtype=torch.float32), batch.labels.device)[batch.owner]


def group_normalizer(groups: Sequence[Group], aggregate: str) -> float:
    """What `member_weights` divides by: the number of tokens that learn, or of groups."""
    if aggregate == "token":
        return sum(len(m.sample.token_ids) * m.weight for g in groups for m in g.members)
    return len(groups)


def member_weights(groups: Sequence[Group], aggregate: str, normalizer: float | None = None) -> list[list[float]]:
    """Per group and member, the weight of each of its tokens (GRPO).

    group: token sums, averaged over a group's members (failed ones count as zero), then over groups; token: one
    mean over all tokens that learn. normalizer: the sum of `group_normalizer` over all ranks; None: these groups'.
    """
    total = group_normalizer(groups, aggregate) if normalizer is None else normalizer
    if not total:
        return [[0.0 for _ in g.members] for g in groups]
    return [[m.weight / (total if aggregate == "token" else len(g.members) * total) for m in g.members] for g in groups]


def reinforce_advantages(
    batches: Sequence[tuple[PackedBatch, Sequence[Member], Tensor]], beta: float, ranks: Ranks, device: torch.device
) -> list[Float[Tensor, " rows"]]:
    """REINFORCE++: token returns with the KL penalty inside, normalised over the global batch.

    `batches` holds (batch, its members, reference token log-probs). A token's return is the reward plus
    -beta (log pi - log ref) summed from that token to the end; returns are centred and divided by their standard
    deviation over all tokens of all ranks.
    """
    returns = []
    for batch, members, reference in batches:
        penalty = -beta * (batch.sampler_logps - reference)
        parts = []
        for i, member in enumerate(members):
            part = penalty[batch.row_bounds[i] : batch.row_bounds[i + 1]]
            parts.append(part.flip(0).cumsum(0).flip(0) + member.reward)
        returns.append(torch.cat(parts))
    mean, deviation = ranks.moments(torch.cat(returns) if returns else torch.zeros(0, device=device))
    return [(r - mean) / (deviation + 1e-8) for r in returns]


@dataclass(frozen=True)
class PolicyResult:
    loss: Tensor
    kl: Tensor
    clip_fraction: Tensor


def policy(
    hidden: Float[Tensor, "rows hidden"],
    head: Head,
    batch: PackedBatch,
    targets: TokenTargets,
    settings: LearnSettings,
) -> PolicyResult:
    """GRPO (KL penalty in the loss, optional truncated weights) or REINFORCE++ (clipped ratio)."""
    reinforce = settings.objective == "reinforce"
    out = linear_policy_loss(
        hidden,
        head.weight,
        batch.labels,
        targets.advantages,
        targets.weights,
        ref_logps=targets.reference,
        old_logps=batch.sampler_logps if reinforce else None,
        sampler_logps=batch.sampler_logps if settings.importance_weights else None,
        kl_beta=0.0 if reinforce else settings.beta,
        clip=settings.ppo_clip if reinforce else None,
        truncation=settings.truncation if settings.importance_weights else None,
        entropy_weight=settings.entropy_weight,
        bias=head.bias,
        softcap=head.softcap,
    )
    return PolicyResult(out.loss, out.kl.sum(), out.clip_fraction)
