"""Pairwise preference losses straight from hidden states and an LM head, with gradients in three GEMMs.

A preference loss needs the log-prob sum of a whole sequence before its gradient exists, but depends on one pair
at a time. Chunks therefore hold whole pairs: their logits are computed once, summed into sequence log-probs,
turned into the loss and its per-token factors, overwritten with their own gradient, and pushed into dHidden and
dWeight. Only a pair that is longer than the chunk budget has its logits computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from advgame_kernels import _checks
from advgame_kernels._twins import pick, twin_of
from advgame_kernels.head import (
    Head,
    HeadGrads,
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
from advgame_kernels.preference import (
    SequenceTerms,
    assemble,
    check_reference,
    device_scalar,
    gradient_of,
    inverse_normalizer,
    result_dtype,
    sequence_terms,
)
from advgame_kernels.preference_kinds import PreferenceSpec
from advgame_kernels.types import LogProbs, PreferenceOutput


class PairChunk(NamedTuple):
    """Consecutive whole pairs. `rows` exceeds the budget only when there is a single pair in it."""

    pairs: slice
    rows: slice


def plan_pairs(bounds: Sequence[int], budget: int) -> Iterator[PairChunk]:
    """Greedy chunks of whole pairs of at most `budget` rows; a longer pair is a chunk of its own."""
    pairs = len(bounds) // 2
    first = 0
    while first < pairs:
        last = first + 1
        while last < pairs and bounds[2 * last + 2] - bounds[2 * first] <= budget:
            last += 1
        yield PairChunk(slice(first, last), slice(bounds[2 * first], bounds[2 * last]))
        first = last


@dataclass(frozen=True)
class _Batch:
    """What every chunk of a call reads."""

    hidden: Tensor  # (N, H) detached
    labels: Tensor  # (N,)
    ref: Tensor | None  # (2P,)
    lengths: list[int]  # 2P
    counts: Tensor  # (2P,) the same on the device
    bounds: Tensor  # (2P + 1,) on the device
    scale: Tensor  # (1,) float64: 1 / normalizer
    spec: PreferenceSpec


class _ChunkResult(NamedTuple):
    terms: SequenceTerms
    entropy: Tensor  # (2p,) float64 mean token entropy
    d_logps: Tensor | None  # (n,) loss gradient of each token's log-prob
    d_entropy: Tensor | None  # (n,)


def _scaled(terms: SequenceTerms, scale: Tensor) -> tuple[Tensor, SequenceTerms]:
    return terms.total * scale[0], terms


def _chunk_loss(batch: _Batch, chunk: PairChunk, stats: LogProbs, want_grads: bool, impl: str) -> _ChunkResult:
    """Sequence sums in float64, the loss on them, and the gradient factor of every token."""
    if impl == "triton":
        return _chunk_loss_triton(batch, chunk, stats, want_grads)
    of = slice(2 * chunk.pairs.start, 2 * chunk.pairs.stop)
    spec, lengths, counts = batch.spec, batch.lengths[of], batch.counts[of]
    ref = None if batch.ref is None else batch.ref[of]
    sums = torch.stack([part.sum(dtype=torch.float64) for part in stats.logps.split(lengths)])
    mean_entropy = torch.stack([part.sum(dtype=torch.float64) for part in stats.entropy.split(lengths)])
    mean_entropy = mean_entropy / counts.clamp(min=1)
    if not want_grads:
        return _ChunkResult(sequence_terms(sums, ref, counts, spec), mean_entropy, None, None)
    factor, terms = gradient_of(lambda s: _scaled(sequence_terms(s, ref, counts, spec), batch.scale), sums)
    rows = stats.logps.shape[0]
    d_logps = torch.repeat_interleave(factor, counts, output_size=rows).to(stats.logps.dtype)
    d_entropy = None
    if spec.entropy_weight:
        share = -0.5 * spec.entropy_weight * batch.scale / counts.clamp(min=1).double()
        d_entropy = torch.repeat_interleave(share, counts, output_size=rows).to(stats.logps.dtype)
    detached = SequenceTerms(*(x.detach() for x in terms))
    return _ChunkResult(detached, mean_entropy, d_logps, d_entropy)


def _chunk_loss_triton(batch: _Batch, chunk: PairChunk, stats: LogProbs, want_grads: bool) -> _ChunkResult:
    from advgame_kernels import preference_triton

    of = slice(2 * chunk.pairs.start, 2 * chunk.pairs.stop)
    found = preference_triton.pair_terms(
        stats.logps, stats.entropy, batch.bounds[of.start : of.stop + 1], batch.counts[of],
        None if batch.ref is None else batch.ref[of], batch.scale, chunk.rows.start, batch.spec, want_grads,
    )  # fmt: skip
    entropy_term = want_grads and batch.spec.entropy_weight != 0.0
    return _ChunkResult(
        preference_triton.as_sequence_terms(found), found.terms[:, 6:8].flatten(),
        found.d_logps if want_grads else None, found.d_entropy if entropy_term else None,
    )  # fmt: skip


def _walk_chunk(batch: _Batch, chunk: PairChunk, head: Head, work: Workspace, grads: HeadGrads) -> _ChunkResult:
    """One chunk, forward and (when asked) backward."""
    pieces = list(row_chunks(chunk.rows.start, chunk.rows.stop, head.row_budget))
    found = []
    logits = None
    for rows in pieces:
        logits = work.logits(batch.hidden[rows])
        found.append(stats_of(head, logits, batch.labels[rows]))
    if found:
        stats = found[0] if len(found) == 1 else LogProbs(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    else:
        stats = LogProbs(*(batch.hidden.new_zeros(0, dtype=head.stats_dtype) for _ in range(3)))
    result = _chunk_loss(batch, chunk, stats, grads.wanted, head.impl)
    if result.d_logps is None:
        return result
    for rows, part in zip(pieces, found, strict=True):
        if len(pieces) > 1:
            logits = work.logits(batch.hidden[rows])  # the pair did not fit: only its logits are computed again
        assert logits is not None
        inner = slice(rows.start - chunk.rows.start, rows.stop - chunk.rows.start)
        push_grads(
            head, grads, work, rows, batch.hidden[rows], batch.labels[rows], logits, part, result.d_logps[inner],
            None if result.d_entropy is None else result.d_entropy[inner], None,
        )  # fmt: skip
    return result


def linear_preference_loss(
    hidden: Tensor,  # (N, H) response rows only; per pair the chosen sequence, then the rejected one
    weight: Tensor,  # (V, H) dtype of hidden, or float32 beside half precision
    labels: Tensor,  # (N,) int64, the token that each row predicts
    cu_seqlens: Sequence[int] | Tensor,  # (2P + 1,) on the host
    ref_logps: Tensor | None,  # (2P,) summed reference log-probs; None for reference-free kinds
    *,
    kind: str = "sigmoid",
    beta: float = 0.1,
    average: bool = False,
    label_smoothing: float = 0.0,
    robust: bool = False,
    simpo_gamma: float = 0.5,
    discopop_tau: float = 0.05,
    nll_weight: float = 0.0,
    entropy_weight: float = 0.0,
    normalizer: float | Tensor | None = None,
    bias: Tensor | None = None,  # (V,)
    softcap: float = 0.0,
    temperature: float = 1.0,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    impl: str = "auto",
    process_group: dist.ProcessGroup | None = None,
    skip_below: float = 0.0,
) -> PreferenceOutput:
    """`preference_loss` of the sequences' summed log-probs, without their logits ever being whole in memory.

    The gradient is computed together with the loss: three GEMMs (logits, dHidden, dWeight), four for a pair
    longer than the chunk budget, one under no_grad; none for a frozen weight's dWeight, which otherwise
    accumulates in float32. Extra memory: `chunk_bytes` of logits (None: 192 MiB on the CPU, 1 GiB on a GPU) in
    `logits_dtype` (None: float32, float64 for float64 inputs; the head's own dtype is faster and puts its
    rounding into the margins), and dWeight. A float32 master weight beside half-precision hidden states is
    converted once, and its gradient stays in float32.

    `nll_weight` adds, per pair, minus the mean log-prob of the chosen tokens times it; `entropy_weight` subtracts
    the mean over both sequences of their mean token entropy times it. The total is divided by `normalizer` (the
    global number of pairs; None: P). P may be 0 with a normalizer. Logits are soft-capped, then divided by
    `temperature`.

    `skip_below` above 0 leaves out of the gradient GEMMs the blocks of the vocabulary in which no gradient
    exceeds that share of its row's factor (skipping.py states the bound and the price).

    With `process_group` the weight (and bias) is this rank's equal share of the vocabulary rows, in rank order,
    everything else is the same on all ranks, and so are the loss and the gradient of hidden.

    Raises ValueError naming the argument for a wrong shape, dtype, device or setting, a `cu_seqlens` on a GPU,
    and (on the CPU; a device assertion on a GPU) a label out of range. The gradient itself cannot be
    differentiated again.
    """
    spec = PreferenceSpec(
        kind, beta, average, label_smoothing, robust, simpo_gamma, discopop_tau, nll_weight, entropy_weight
    )
    options = HeadOptions(bias, softcap, temperature, chunk_bytes, logits_dtype, impl, process_group, skip_below)
    head = make_head(hidden, weight, labels, options)
    bounds = _checks.host_bounds(cu_seqlens, hidden.shape[0])
    sequences = len(bounds) - 1
    check_reference(ref_logps, sequences, hidden.device, spec)
    scale = inverse_normalizer(normalizer, sequences // 2)
    grads = make_grads(hidden, weight, bias)
    dtype = result_dtype(hidden)
    with torch.no_grad():
        lengths = [b - a for a, b in pairwise(bounds)]
        on_device = to_device(lengths + bounds, hidden.device)
        batch = _Batch(
            hidden.detach().contiguous(), labels, ref_logps, lengths, on_device[:sequences], on_device[sequences:],
            device_scalar(scale, hidden.device), spec,
        )  # fmt: skip
        chunks = list(plan_pairs(bounds, head.row_budget))
        rows = largest_chunk((c.rows.stop - c.rows.start for c in chunks), head.row_budget)
        work = Workspace(head, rows)
        results = [_walk_chunk(batch, chunk, head, work, grads) for chunk in chunks]
        grads.finish(head.shard)
        terms, entropy = _join(results, hidden)
        loss = ((terms.total - 0.5 * spec.entropy_weight * entropy.sum()) * batch.scale[0]).to(dtype)
    return assemble(attach(loss, hidden, weight, bias, grads), terms, entropy, beta, dtype)


def to_device(values: list[int], device: torch.device) -> Tensor:  # (len(values),) int64
    """A host list on the device without waiting for it: through pinned memory where there is a GPU."""
    host = torch.tensor(values, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def _join(results: list[_ChunkResult], like: Tensor) -> tuple[SequenceTerms, Tensor]:
    if not results:
        empty = like.new_zeros(0, dtype=torch.float64)
        return SequenceTerms(empty.sum(), empty, empty, empty.view(0, 2)), empty
    terms = SequenceTerms(
        torch.stack([r.terms.total for r in results]).sum(),
        torch.cat([r.terms.losses for r in results]),
        torch.cat([r.terms.logps for r in results]),
        torch.cat([r.terms.logratios for r in results]),
    )
    return terms, torch.cat([r.entropy for r in results])


@twin_of(linear_preference_loss)
def linear_preference_loss_ref(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Sequence[int] | Tensor,
    ref_logps: Tensor | None,
    **settings: Any,
) -> PreferenceOutput:
    """`linear_preference_loss` with all logits in memory and torch's autograd; see `linear_logprobs_ref`.

    `skip_below` is ignored too: the gradient is whole.
    """
    spec = pick(PreferenceSpec, settings)
    bounds = _checks.host_bounds(cu_seqlens, hidden.shape[0])
    lengths = [b - a for a, b in pairwise(bounds)]
    counts = torch.tensor(lengths, device=hidden.device, dtype=torch.int64)
    tokens = whole_logprobs(hidden, weight, labels, pick(HeadOptions, settings))
    index = torch.repeat_interleave(torch.arange(len(lengths), device=hidden.device), counts)
    zeros = torch.zeros(len(lengths), device=hidden.device, dtype=torch.float64)
    sums = zeros.index_add(0, index, tokens.logps.double())
    entropy = zeros.index_add(0, index, tokens.entropy.double()) / counts.clamp(min=1)
    terms = sequence_terms(sums, ref_logps, counts, spec)
    total = terms.total - 0.5 * spec.entropy_weight * entropy.sum()
    dtype = result_dtype(hidden)
    loss = (total * inverse_normalizer(settings["normalizer"], len(lengths) // 2)).to(dtype)
    return assemble(loss, terms, entropy, spec.beta, dtype)
