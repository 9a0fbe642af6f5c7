"""linear_logprobs and linear_policy_loss on one LM head, against three bare GEMMs and whoever computes the same."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import advgame_kernels as ak
import torch
from torch import Tensor

from bench import peers
from bench.floors import three_gemms
from bench.head import HeadCase, measured, small
from bench.logits import running
from bench.memory import with_peaks
from bench.timing import alternate, table

KL_BETA = 0.04


@dataclass(frozen=True)
class TokenProblem:
    """Response rows of a case with what a policy loss wants for each of them."""

    case: HeadCase
    hidden: Tensor  # (n, H), a leaf
    weight: Tensor  # (V, H), a leaf
    labels: Tensor  # (n,)
    advantages: Tensor  # (n,) one value a sequence
    weights: Tensor  # (n,) means over tokens, then over sequences
    ref: Tensor  # (n,)

    def grads(self, loss: Tensor) -> tuple[Tensor, ...]:
        """Backward, to hidden states and head."""
        return torch.autograd.grad(loss, (self.hidden, self.weight))


def make_tokens(case: HeadCase, device: torch.device) -> TokenProblem:
    """Random inputs of a case."""
    torch.manual_seed(0)
    n, sequences = case.response, 2 * case.pairs
    hidden = torch.randn(n, case.width, device=device).to(case.dtype)
    weight = torch.empty(case.vocab, case.width, device=device, dtype=case.dtype).normal_(std=case.width**-0.5)
    labels = torch.randint(0, case.vocab, (n,), device=device)
    lengths = torch.tensor([b - a for a, b in pairwise(case.bounds)], device=device)
    advantages = torch.randn(sequences, device=device).repeat_interleave(lengths)
    weights = (1.0 / (lengths * sequences)).repeat_interleave(lengths)
    ref = torch.randn(n, device=device) - torch.tensor(float(case.vocab)).log().item()
    return TokenProblem(case, hidden.requires_grad_(), weight.requires_grad_(), labels, advantages, weights, ref)


def grpo(tokens: Tensor, p: TokenProblem) -> Tensor:
    """GRPO on policy with the k3 penalty, from token log-probs, as plain code writes it."""
    gap = p.ref - tokens
    ratio = torch.exp(tokens - tokens.detach())
    return (p.weights * (KL_BETA * (torch.exp(gap) - gap - 1.0) - ratio * p.advantages)).sum()


def mean_nll(tokens: Tensor, p: TokenProblem) -> Tensor:
    """Weighted negative log-probs: what is asked of token log-probs alone."""
    return -(p.weights * tokens).sum()


Loss = Callable[[TokenProblem], Tensor]
Tail = Callable[[Tensor, TokenProblem], Tensor]


@functools.cache
def _compiled(tail: Tail) -> Callable[..., Tensor]:
    return torch.compile(lambda p_hidden, p_weight, p: tail(peers.eager_tokens(p_hidden, p_weight, p.labels), p))


def liger_grpo(p: TokenProblem) -> Tensor:
    """Liger's fused linear GRPO; padding the packed rows is part of its interface."""
    losses = importlib.import_module("liger_kernel.chunked_loss")
    lengths = [b - a for a, b in pairwise(p.case.bounds)]
    shape = (len(lengths), max(lengths))
    spot = torch.cat([torch.arange(n) + i * shape[1] for i, n in enumerate(lengths)]).to(p.hidden.device)

    def pad(x: Tensor) -> Tensor:
        flat = x.new_zeros(shape[0] * shape[1], *x.shape[1:])
        return flat.index_copy(0, spot, x).view(*shape, *x.shape[1:])

    mask = pad(torch.ones_like(p.ref))
    each = p.advantages[torch.tensor(p.case.bounds[:-1], device=p.hidden.device)]
    loss = losses.LigerFusedLinearGRPOLoss(
        beta=KL_BETA, compiled=p.hidden.is_cuda, use_ref_model=True, loss_type="grpo"
    )
    out = loss(pad(p.hidden), p.weight, pad(p.labels), mask, each, ref_per_token_logps=pad(p.ref))
    return out[0]


def contenders(tail: Tail) -> dict[str, Loss]:
    """Everybody who can be asked for a work, ours first."""
    found: dict[str, Loss] = {}
    for name, dtype in (("float32", torch.float32), ("the head's", None)):

        def ours(p: TokenProblem, dtype: torch.dtype | None = dtype) -> Tensor:
            kw: dict[str, Any] = {"logits_dtype": p.case.dtype if dtype is None else dtype}
            if tail is mean_nll:
                return mean_nll(ak.linear_logprobs(p.hidden, p.weight, p.labels, **kw).logps, p)
            return ak.linear_policy_loss(
                p.hidden, p.weight, p.labels, p.advantages, p.weights, ref_logps=p.ref, kl_beta=KL_BETA, **kw
            ).loss

        found[f"ours, {name} logits"] = ours
    for name, tokens in peers.TOKENS.items():
        found[name] = lambda p, tokens=tokens: tail(tokens(p.hidden, p.weight, p.labels), p)
    found["eager torch, torch.compile"] = lambda p: _compiled(tail)(p.hidden, p.weight, p)
    if tail is grpo:
        found["Liger, fused linear GRPO"] = liger_grpo
    return found


def prepare(case: HeadCase, tail: Tail, name: str) -> Callable[[], object]:
    """For a memory measurement in a process of its own."""
    loss, device = contenders(tail)[name], torch.device("cpu")
    first = make_tokens(case if "torch.compile" in name else small(case), device)
    first.grads(loss(first))
    p = make_tokens(case, device)
    return lambda: p.grads(loss(p))


def _bench(title: str, tail: Tail, case: HeadCase, device: torch.device, repeats: int, slow: bool) -> dict[str, Any]:
    print(f"\n{title}: {case.response} rows, vocabulary {case.vocab}, width {case.width}, {case.dtype}")
    floor = three_gemms(case.shape, case.dtype, device, repeats)
    print(f"  floor: three bare GEMMs, {case.shape.flops / 1e12:.3g} TFLOP in {floor:.2f} ms")
    p = make_tokens(case, device)
    runs = {name: lambda loss=loss: p.grads(loss(p)) for name, loss in contenders(tail).items()}
    if case.dtype == torch.float32:
        del runs["ours, the head's logits"]  # the same
    left_out: dict[str, str] = {}
    if device.type == "cpu" and not slow:
        left_out |= peers.SLOW_ON_CPU
        runs = {name: run for name, run in runs.items() if name not in left_out}
    timings = alternate(running(runs, left_out), device, repeats, warm=True)
    timings = with_peaks(timings, device, prepare, case, tail)
    print(table("  forward and backward", timings, floor))
    return measured(case, floor, timings, left_out)


def bench_tokens(case: HeadCase, device: torch.device, repeats: int, slow: bool = False) -> dict[str, Any]:
    """linear_logprobs forward and backward, whose gradients need a fourth GEMM; printed and returned."""
    return _bench("linear_logprobs", mean_nll, case, device, repeats, slow)


def bench_policy(case: HeadCase, device: torch.device, repeats: int, slow: bool = False) -> dict[str, Any]:
    """linear_policy_loss forward and backward; printed and returned."""
    return _bench("linear_policy_loss, GRPO with KL", grpo, case, device, repeats, slow)
