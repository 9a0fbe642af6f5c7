"""A linear head walked in chunks of rows: logits exist for one chunk at a time, forward and backward.

A chunk is (rows) → logits GEMM → `passes.row_stats` → … → `passes.row_grads_` in place → two gradient GEMMs. The
functions on top differ only in how they turn a chunk's statistics into per-row gradient factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from advgame_kernels import gemm, memory, passes, skipping
from advgame_kernels._checks import linear_head, non_negative, refuse
from advgame_kernels.types import LogProbs
from advgame_kernels.vocab_parallel import VocabShard, make_shard

CPU_CHUNK_BYTES = 192 << 20
# On a GPU each chunk also reads and writes the whole float32 dWeight; 4 k rows make that a few per cent of the GEMMs.
CUDA_CHUNK_BYTES = 1 << 30


@dataclass(frozen=True)
class Head:
    """An LM head and how its logits are to be read."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    temperature: float
    softcap: float
    logits_dtype: torch.dtype
    row_budget: int  # rows of a chunk
    impl: str  # of the passes, already chosen
    shard: VocabShard | None = None  # what part of the vocabulary the weight is, if not all
    skip_below: float = 0.0  # see skipping.py

    @property
    def stats_dtype(self) -> torch.dtype:
        """dtype of log-probs, entropy and lse."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32


@dataclass
class HeadGrads:
    """Gradients filled chunk by chunk; None where nobody asked. Memory starts uninitialised."""

    hidden: Tensor | None  # (N, H) dtype of hidden
    weight: Tensor | None  # (V, H) float32, or float64
    bias: Tensor | None  # (V,) float32, or float64
    started: bool = False  # whether a chunk has written weight and bias

    @property
    def wanted(self) -> bool:
        """Whether any gradient is asked for; without one only the forward half runs."""
        return self.hidden is not None or self.weight is not None or self.bias is not None

    def finish(self, shard: VocabShard | None) -> None:
        """After the last chunk: gradients of weight and bias are zero without any; dHidden is summed over shards."""
        if shard is not None and self.hidden is not None:
            shard.sum_(self.hidden)
        for grad in (self.weight, self.bias):
            if grad is not None and not self.started:
                grad.zero_()


@dataclass(frozen=True)
class HeadOptions:
    """The keywords that every function of a linear head shares; `linear_preference_loss` says what they do."""

    bias: Tensor | None = None  # (V,)
    softcap: float = 0.0
    temperature: float = 1.0
    chunk_bytes: int | None = None
    logits_dtype: torch.dtype | None = None
    impl: str = "auto"
    process_group: dist.ProcessGroup | None = None
    skip_below: float = 0.0


def make_head(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,)
    options: HeadOptions,
) -> Head:
    """Check the arguments, and resolve the defaults: float32 logits for half precision, chunk size by device,
    implementation by both.

    A float32 weight beside half-precision hidden states is converted here, once a call.

    Raises ValueError for a wrong shape, dtype, device or setting, RuntimeError for an implementation that cannot
    serve.
    """
    shard = make_shard(weight, options.process_group)
    ranks = 1 if shard is None else shard.ranks
    bias = options.bias
    linear_head(hidden, weight, labels, bias, options.temperature, options.softcap, ranks)
    dtype, logits_dtype, chunk_bytes = hidden.dtype, options.logits_dtype, options.chunk_bytes
    if logits_dtype is None:
        logits_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if logits_dtype != dtype and (logits_dtype != torch.float32 or dtype == torch.float64):
        refuse("logits_dtype", f"torch.float32 or the head's own dtype {dtype}", logits_dtype)
    if chunk_bytes is None:
        chunk_bytes = CUDA_CHUNK_BYTES if hidden.is_cuda else CPU_CHUNK_BYTES
    if not isinstance(chunk_bytes, int) or chunk_bytes <= 0:
        refuse("chunk_bytes", "a number of bytes above 0", chunk_bytes)
    non_negative("skip_below", options.skip_below)
    return Head(
        weight=weight.detach().to(dtype),
        bias=None if bias is None else bias.detach(),
        temperature=options.temperature,
        softcap=options.softcap,
        logits_dtype=logits_dtype,
        row_budget=max(1, chunk_bytes // (weight.shape[0] * logits_dtype.itemsize)),
        impl=passes.choose(options.impl, logits_dtype, hidden.device),
        shard=shard,
        skip_below=options.skip_below,
    )


def make_grads(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> HeadGrads:
    """Gradients to be filled for what requires them now; all None under no_grad, so eval pays for the forward alone."""
    on = torch.is_grad_enabled()
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return HeadGrads(
        hidden=torch.empty_like(hidden) if on and hidden.requires_grad else None,
        weight=memory.empty(weight.shape, wide, weight.device) if on and weight.requires_grad else None,
        bias=torch.empty_like(bias, dtype=wide) if on and bias is not None and bias.requires_grad else None,
    )


class Workspace:
    """The buffers that every chunk of a walk reuses."""

    def __init__(self, head: Head, rows: int) -> None:
        self.head = head
        self.rows = rows  # of the largest chunk
        self.buffer = self._empty(head.logits_dtype)
        self.narrow: Tensor | None = None

    def _empty(self, dtype: torch.dtype) -> Tensor:
        return memory.empty((self.rows, self.head.weight.shape[0]), dtype, self.head.weight.device)

    def logits(self, hidden: Tensor) -> Tensor:  # (n, H) -> (n, V)
        """Raw logits of the rows, in the shared buffer: valid until the next call."""
        out = self.buffer[: hidden.shape[0]]
        gemm.logits_into(out, hidden, self.head.weight, self.head.bias)
        return out

    def room(self, rows: int) -> Tensor | None:  # (rows, V)
        """Memory for the gradient of logits wider than the head, where it cannot take theirs; see native.row_grads_."""
        if self.head.impl != "native" or (self.head.weight.dtype, self.head.logits_dtype) != (
            torch.bfloat16,
            torch.float32,
        ):
            return None
        if self.narrow is None:
            self.narrow = self._empty(self.head.weight.dtype)
        return self.narrow[:rows]


def stats_of(head: Head, logits: Tensor, labels: Tensor) -> LogProbs:
    """Statistics of a chunk of raw logits, over the whole vocabulary."""
    if head.shard is None:
        return passes.row_stats(logits, labels, head.temperature, head.softcap, head.impl)
    own = head.shard.local_labels(labels).clamp(min=0)
    return head.shard.merge(passes.row_stats(logits, own, head.temperature, head.softcap, head.impl), labels)


def push_grads(
    head: Head,
    grads: HeadGrads,
    work: Workspace,
    rows: slice,
    hidden: Tensor,  # (n, H) those rows
    labels: Tensor,  # (n,)
    logits: Tensor,  # (n, V) raw; overwritten
    stats: LogProbs,
    d_logps: Tensor | None,  # (n,)
    d_entropy: Tensor | None,  # (n,)
    d_lse: Tensor | None,  # (n,)
) -> None:
    """Turn a chunk's logits into their gradient in place and add its share to `grads`."""
    if head.shard is not None:
        labels = head.shard.local_labels(labels)
    dlogits = passes.row_grads_(
        logits, labels, stats, d_logps, d_entropy, d_lse, head.temperature, head.softcap, hidden.dtype, head.impl,
        work.room(logits.shape[0]),
    )  # fmt: skip
    if head.skip_below > 0.0 and d_logps is not None:
        _push_kept(head, grads, rows, hidden, dlogits, skipping.kept_runs(dlogits, d_logps, head.skip_below))
    else:
        if grads.hidden is not None:
            gemm.hidden_grad_into(grads.hidden[rows], dlogits, head.weight)
        if grads.weight is not None:
            gemm.add_weight_grad_(grads.weight, dlogits, hidden, fresh=not grads.started)
    if grads.bias is not None:
        share = dlogits.sum(dim=0, dtype=grads.bias.dtype)
        grads.bias.copy_(grads.bias + share if grads.started else share)
    grads.started = True


def _push_kept(head: Head, grads: HeadGrads, rows: slice, hidden: Tensor, dlogits: Tensor, runs: list[slice]) -> None:
    """The two gradient GEMMs over the kept columns only."""
    if grads.hidden is not None:
        total = torch.zeros_like(hidden, dtype=head.stats_dtype)
        part = torch.empty_like(hidden)
        for run in runs:
            # contiguous: torch's CPU product of bfloat16 rows with gaps between them reads into the gaps
            gemm.hidden_grad_into(part, dlogits[:, run].contiguous(), head.weight[run])
            total += part
        grads.hidden[rows] = total.to(hidden.dtype)
    if grads.weight is not None:
        if not grads.started:
            grads.weight.zero_()
        for run in runs:
            gemm.add_weight_grad_(grads.weight[run], dlogits[:, run].contiguous(), hidden)


def row_chunks(start: int, stop: int, budget: int) -> Iterator[slice]:
    """[start, stop) in slices of at most `budget` rows, as even as they can be."""
    rows = stop - start
    if rows <= 0:
        return
    pieces = -(-rows // budget)
    for i in range(pieces):
        yield slice(start + rows * i // pieces, start + rows * (i + 1) // pieces)


def largest_chunk(lengths: Iterable[int], budget: int) -> int:
    """Rows of the largest chunk when stretches of these lengths are cut by `row_chunks`."""
    return max([0, *(-(-n // -(-n // budget)) for n in lengths if n > 0)])  # torch.compile knows no default= of max


class _Attach(torch.autograd.Function):
    """Gives a loss the gradients that were computed along with it."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *grads: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(*grads)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        # Out of place, so that a retained graph may be used again; the product lands in the gradient's final dtype.
        # Only a factor of 1 needs no product, and it can be read without waiting on the CPU alone.
        readable = upstream.device.type == "cpu" and not torch.compiler.is_compiling()
        one = readable and not _keeps_graph() and float(upstream) == 1.0
        scaled: list[Tensor | None] = []
        for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            if grad is None or (one and grad.dtype == dtype):
                scaled.append(grad)
            else:
                scaled.append(_product(grad, upstream, dtype))
        return None, *scaled, None, None, None


def _keeps_graph() -> bool:
    """Whether the running backward pass leaves its graph for another one; True where torch does not tell."""
    told = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if told is None else bool(told())


def _product(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """grad · factor, rounded once to `dtype`."""
    out = memory.empty(grad.shape, dtype, grad.device)
    if grad.device.type != "cpu" or grad.ndim == 0:
        return torch.mul(grad, factor, out=out)
    for rows in row_chunks(0, grad.shape[0], 4096):
        out[rows] = grad[rows] * factor  # torch would make the whole product in float32 before it rounds
    return out


def attach(loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, grads: HeadGrads) -> Tensor:
    """`loss` as an autograd node whose gradients are `grads`, scaled by whatever comes from upstream."""
    if not grads.wanted:
        return loss
    return _Attach.apply(loss, hidden, weight, bias, grads.hidden, grads.weight, grads.bias)
