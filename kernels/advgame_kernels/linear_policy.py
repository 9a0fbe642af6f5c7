"""Token-level policy losses straight from hidden states and an LM head, with gradients in three GEMMs.

The gradient factor of a token depends on that token alone, so each chunk of rows is finished before the next one
starts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from advgame_kernels._twins import pick, twin_of
from advgame_kernels.head import (
    HeadOptions,
    Workspace,
    attach,
    largest_chunk,
    make_grads,
    make_head,
    push_grads,
    row_chunks,
    stats_of,
)
from advgame_kernels.linear_logprobs import whole_logprobs
from advgame_kernels.policy import (
    Clip,
    PolicyInputs,
    PolicySpec,
    TokenTerms,
    check_policy_inputs,
    finish,
    token_factors,
    token_terms,
)
from advgame_kernels.preference import result_dtype
from advgame_kernels.types import PolicyOutput


def linear_policy_loss(
    hidden: Tensor,  # (N, H) response rows only
    weight: Tensor,  # (V, H) dtype of hidden, or float32 beside half precision
    labels: Tensor,  # (N,) int64, the token that each row predicts
    advantages: Tensor,  # (N,)
    weights: Tensor,  # (N,) 0 takes a token out of the loss
    *,
    ref_logps: Tensor | None = None,  # (N,)
    old_logps: Tensor | None = None,  # (N,)
    sampler_logps: Tensor | None = None,  # (N,)
    kl_beta: float = 0.0,
    clip: Clip = None,
    truncation: float | None = None,
    entropy_weight: float = 0.0,
    bias: Tensor | None = None,  # (V,)
    softcap: float = 0.0,
    temperature: float = 1.0,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    impl: str = "auto",
    process_group: dist.ProcessGroup | None = None,
    skip_below: float = 0.0,
) -> PolicyOutput:
    """`policy_loss` of the tokens' log-probs, without their logits ever being whole in memory.

    `entropy_weight` subtracts sum_t weights_t · entropy_t times it. Memory, precision, gradients and the settings
    of the head, `process_group` and `skip_below` among them, are those of `linear_preference_loss`; the loss
    itself is that of `policy_loss`. N may be 0.

    Raises ValueError naming the argument for a wrong shape, dtype, device or setting and (on the CPU; a device
    assertion on a GPU) a label out of range. The gradient itself cannot be differentiated again.
    """
    spec = PolicySpec(kl_beta, clip, truncation, entropy_weight)
    options = HeadOptions(bias, softcap, temperature, chunk_bytes, logits_dtype, impl, process_group, skip_below)
    head = make_head(hidden, weight, labels, options)
    inputs = PolicyInputs(advantages, weights, ref_logps, old_logps, sampler_logps)
    check_policy_inputs(inputs, hidden.shape[0], hidden.device, spec)
    grads = make_grads(hidden, weight, bias)
    dtype = result_dtype(hidden)
    with torch.no_grad():
        rows_in = hidden.detach().contiguous()
        n = hidden.shape[0]
        logps = hidden.new_empty(n, dtype=head.stats_dtype)
        entropy = torch.empty_like(logps)
        parts: list[TokenTerms] = []
        total = hidden.new_zeros((), dtype=torch.float64)
        work = Workspace(head, largest_chunk([n], head.row_budget))
        for rows in row_chunks(0, n, head.row_budget):
            logits = work.logits(rows_in[rows])
            stats = stats_of(head, logits, labels[rows])
            logps[rows], entropy[rows] = stats.logps, stats.entropy
            part_inputs = inputs.rows(rows)
            terms, d_logps = token_factors(stats.logps, part_inputs, spec, grads.wanted, head.impl)
            parts.append(terms)
            total += terms.loss.sum()
            d_entropy = None
            if spec.entropy_weight:
                live = torch.where(part_inputs.weights != 0, part_inputs.weights.double(), 0.0)
                total -= spec.entropy_weight * (live * stats.entropy.double()).sum()
                d_entropy = (-spec.entropy_weight * live).to(head.stats_dtype)
            if d_logps is not None:
                push_grads(
                    head, grads, work, rows, rows_in[rows], labels[rows], logits, stats, d_logps, d_entropy, None
                )
        grads.finish(head.shard)
        if not parts:
            none = total.new_zeros(0)
            parts.append(TokenTerms(none, none, none, none.bool()))
        joined = TokenTerms(*(torch.cat(p) for p in zip(*parts, strict=True)))
    loss = attach(total.to(dtype), hidden, weight, bias, grads)
    return finish(loss, logps, joined, weights, entropy, dtype)


@twin_of(linear_policy_loss)
def linear_policy_loss_ref(
    hidden: Tensor, weight: Tensor, labels: Tensor, advantages: Tensor, weights: Tensor, **settings: Any
) -> PolicyOutput:
    """`linear_policy_loss` with all logits in memory and torch's autograd; see `linear_logprobs_ref`.

    `skip_below` is ignored too: the gradient is whole.
    """
    spec = pick(PolicySpec, settings)
    inputs = PolicyInputs(advantages, weights, settings["ref_logps"], settings["old_logps"], settings["sampler_logps"])
    tokens = whole_logprobs(hidden, weight, labels, pick(HeadOptions, settings))
    terms = token_terms(tokens.logps, inputs, spec)
    live_weights = torch.where(weights != 0, weights.double(), 0.0)
    total = terms.loss.sum() - spec.entropy_weight * (live_weights * tokens.entropy.double()).sum()
    dtype = result_dtype(hidden)
    return finish(total.to(dtype), tokens.logps, terms, weights, tokens.entropy, dtype)
