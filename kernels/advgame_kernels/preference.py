"""Pairwise preference losses from sequence log-probs that already exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from advgame_kernels import passes
from advgame_kernels._checks import describe, floating, positive, refuse, vector
from advgame_kernels._twins import twin_of
from advgame_kernels.preference_kinds import PreferenceSpec, pair_losses
from advgame_kernels.types import PreferenceOutput

T = TypeVar("T")


def result_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def inverse_normalizer(normalizer: float | Tensor | None, pairs: int) -> float | Tensor:
    """1 / normalizer, with None meaning the number of pairs, of which there must be one then.

    Zero is accepted only where there is no pair: then the loss is zero whatever it is divided by.
    """
    if isinstance(normalizer, Tensor) and normalizer.numel() != 1:
        refuse("normalizer", "a number or a tensor with one element", describe(normalizer))
    if pairs == 0:
        if normalizer is None:
            refuse("normalizer", "a number where a batch is empty (there is no mean over no pairs)", None)
        return 1.0
    if isinstance(normalizer, Tensor) and (normalizer.device.type != "cpu" or torch.compiler.is_compiling()):
        unread = normalizer.reshape(()).double()
        if normalizer.device.type != "meta":
            torch._assert_async((unread > 0) & unread.isfinite(), "normalizer: expected a finite number above 0")
        return unread.reciprocal()
    if normalizer is None:
        return 1.0 / pairs
    value = float(normalizer) if isinstance(normalizer, Tensor) else normalizer
    positive("normalizer", value)
    return 1.0 / value


def device_scalar(value: float | Tensor, device: torch.device) -> Tensor:  # (1,) float64
    """A number on the device. It is filled there: copying it from pageable memory would stop the host."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float64).reshape(1)
    return torch.full((1,), value, dtype=torch.float64, device=device)


def gradient_of(function: Callable[[Tensor], tuple[Tensor, T]], x: Tensor) -> tuple[Tensor, T]:
    """d function(x)[0] / dx and function(x)[1], whatever the grad mode.

    torch.func's form stays whole in a graph of torch.compile; outside of one plain autograd costs less.
    """
    if torch.compiler.is_compiling():
        return torch.func.grad(function, has_aux=True)(x)  # type: ignore[no-any-return]
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        value, more = function(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
    return gradient, more


class SequenceTerms(NamedTuple):
    """Loss of a group of pairs as a function of their sequence sums; everything float64."""

    total: Tensor  # scalar: sum over pairs of loss + nll_weight * nll, not yet normalised
    losses: Tensor  # (P,)
    logps: Tensor  # (2P,) in the units of the loss
    logratios: Tensor  # (P, 2) logp - ref


def sequence_terms(
    sums: Tensor,  # (2P,) float64 summed log-probs, chosen first in each pair
    ref_sums: Tensor | None,  # (2P,)
    lengths: Tensor | None,  # (2P,)
    spec: PreferenceSpec,
) -> SequenceTerms:
    """The loss on sequence sums in differentiable float64 torch: what the Triton kernel is held against."""
    counts = None if lengths is None else lengths.double().clamp(min=1.0)  # an empty sequence has sum and mean 0
    ref = None if ref_sums is None else ref_sums.double()
    logp = sums
    if spec.averages:
        assert counts is not None
        logp = sums / counts
        ref = None if ref is None else ref / counts
    pairs = logp.view(-1, 2)
    ref_pairs = None if ref is None else ref.view(-1, 2)
    chosen_mean = None if counts is None else sums.view(-1, 2)[:, 0] / counts.view(-1, 2)[:, 0]
    losses = pair_losses(pairs, ref_pairs, chosen_mean, spec)
    total = losses.sum()
    if spec.nll_weight:
        assert chosen_mean is not None
        total = total - spec.nll_weight * chosen_mean.sum()
    logratios = pairs if ref_pairs is None else pairs - ref_pairs
    return SequenceTerms(total, losses, logp, logratios)


def assemble(
    loss: Tensor, terms: SequenceTerms, entropy: Tensor | None, beta: float, dtype: torch.dtype
) -> PreferenceOutput:
    """The public output from a loss that carries the gradient and terms that are detached here."""
    ratios = terms.logratios.detach()
    margins = ratios[:, 0] - ratios[:, 1]
    return PreferenceOutput(
        loss=loss,
        losses=terms.losses.detach().to(dtype),
        logps=terms.logps.detach().to(dtype),
        margins=margins.to(dtype),
        chosen_rewards=(beta * ratios[:, 0]).to(dtype),
        rejected_rewards=(beta * ratios[:, 1]).to(dtype),
        accuracies=(margins > 0).to(dtype),
        entropy=None if entropy is None else entropy.detach().to(dtype),
    )


def check_reference(ref_logps: Tensor | None, sequences: int, device: torch.device, spec: PreferenceSpec) -> None:
    """Refuse a missing reference for a kind that needs one, or one of the wrong shape."""
    if ref_logps is None:
        if spec.needs_reference:
            refuse("ref_logps", f"({sequences},) reference log-probs for kind {spec.kind!r}", None)
        return
    vector("ref_logps", ref_logps, sequences, device)
    if ref_logps.requires_grad:
        refuse("ref_logps", "a tensor without requires_grad (the reference is not trained)", "requires_grad=True")


def check_lengths(lengths: Tensor, sequences: int, device: torch.device) -> None:
    """Refuse token counts of the wrong shape or device, and on the CPU, where reading them costs nothing, no counts."""
    counts = isinstance(lengths, Tensor) and not lengths.is_complex() and lengths.dtype != torch.bool
    if not counts or tuple(lengths.shape) != (sequences,) or lengths.device != device:
        refuse("lengths", f"a tensor of {sequences} token counts on {device}", describe(lengths))
    if device.type == "cpu" and not torch.compiler.is_compiling() and not (lengths.isfinite() & (lengths >= 0)).all():
        refuse("lengths", "finite counts of at least 0", lengths.tolist())


def preference_loss(
    policy_logps: Tensor,  # (2P,) summed log-probs, chosen of pair p at 2p, rejected at 2p + 1
    ref_logps: Tensor | None,  # (2P,) summed log-probs of the reference; None for reference-free kinds
    *,
    kind: str = "sigmoid",
    beta: float = 0.1,
    lengths: Tensor | None = None,  # (2P,) token counts
    average: bool = False,
    label_smoothing: float = 0.0,
    robust: bool = False,
    simpo_gamma: float = 0.5,
    discopop_tau: float = 0.05,
    nll_weight: float = 0.0,
    normalizer: float | Tensor | None = None,
    impl: str = "auto",
) -> PreferenceOutput:
    """A pairwise loss, `preference_kinds.KINDS`, from sequence log-probs in nats.

    Both log-prob inputs are always sums; with `average`, and for the kinds ipo_mean, simpo and orpo, they are
    divided by `lengths` here, and `logps`, margins and rewards are means too. `nll_weight` adds, per pair, that
    weight times minus the mean log-prob of the chosen tokens (published CPO and ORPO take 1). The sum over pairs
    is divided by `normalizer` (the global number of pairs; None: this call's). P may be 0 with a normalizer: a
    zero loss with a zero gradient. Reference-free kinds use `ref_logps`, if given, for margins and rewards only.
    Computed in float64 (the margin is a small difference of large sums), returned as float32 unless the input is
    float64.

    Raises ValueError for a wrong shape, dtype, device or setting. Formulas and sources: preference_kinds.py.
    """
    spec = PreferenceSpec(kind, beta, average, label_smoothing, robust, simpo_gamma, discopop_tau, nll_weight)
    floating("policy_logps", policy_logps, 1)
    sequences = policy_logps.shape[0]
    if sequences % 2:
        refuse("policy_logps", "an even number of sequences (chosen, rejected, chosen, …)", sequences)
    check_reference(ref_logps, sequences, policy_logps.device, spec)
    if lengths is None:
        if spec.needs_lengths:
            refuse("lengths", "token counts: average, nll_weight or the kind divides by them", None)
    else:
        check_lengths(lengths, sequences, policy_logps.device)
    scale = inverse_normalizer(normalizer, sequences // 2)
    dtype = result_dtype(policy_logps)
    if passes.choose(impl, torch.float32, policy_logps.device) == "triton":
        return _preference_loss_triton(policy_logps, ref_logps, lengths, spec, scale, dtype)
    terms = sequence_terms(policy_logps.double(), ref_logps, lengths, spec)
    return assemble((terms.total * scale).to(dtype), terms, None, beta, dtype)


class Factors(torch.autograd.Function):
    """Gives a loss the gradient factors that were computed along with it."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, policy_logps: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(factors)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (factors,) = ctx.saved_tensors
        return None, factors * upstream, None


def _preference_loss_triton(
    policy_logps: Tensor,
    ref_logps: Tensor | None,
    lengths: Tensor | None,
    spec: PreferenceSpec,
    scale: float | Tensor,
    dtype: torch.dtype,
) -> PreferenceOutput:
    """One launch for loss and factors: to the kernel, each sequence is one token that holds the sum."""
    from advgame_kernels import preference_triton

    sequences = policy_logps.shape[0]
    device = policy_logps.device
    counts = torch.ones(sequences, dtype=torch.int64, device=device) if lengths is None else lengths.to(torch.int64)
    bounds = torch.arange(sequences + 1, device=device)
    scale_there = device_scalar(scale, device)
    want = policy_logps.requires_grad and torch.is_grad_enabled()
    with torch.no_grad():
        found = preference_triton.pair_terms(
            policy_logps.detach().contiguous(), None, bounds, counts, ref_logps, scale_there, 0, spec, want
        )
        terms = preference_triton.as_sequence_terms(found)
        loss = (terms.total * scale_there[0]).to(dtype)
    if want:
        loss = Factors.apply(loss, policy_logps, found.d_logps)
    return assemble(loss, terms, None, spec.beta, dtype)


@twin_of(preference_loss)
def preference_loss_ref(
    policy_logps: Tensor,  # (2P,)
    ref_logps: Tensor | None,  # (2P,)
    **settings: Any,
) -> PreferenceOutput:
    """`preference_loss` in differentiable torch whatever the device; `impl` is ignored."""
    return preference_loss(policy_logps, ref_logps, **(settings | {"impl": "torch"}))
