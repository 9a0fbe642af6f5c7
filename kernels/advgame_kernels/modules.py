"""The losses as torch modules: settings at construction, tensors at the call, names checked at once.

Each module takes exactly the keyword settings of the function it wraps; what changes from call to call stays an
argument of `forward`. They hold no parameters. `WeightAverage` holds the shadow of a model and saves with its
state dict.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from advgame_kernels.ema import ema_update_
from advgame_kernels.linear_logprobs import linear_logprobs
from advgame_kernels.linear_policy import linear_policy_loss
from advgame_kernels.linear_preference import linear_preference_loss
from advgame_kernels.logprobs import selective_logprobs
from advgame_kernels.policy import policy_loss
from advgame_kernels.preference import preference_loss
from advgame_kernels.types import LogProbs, PolicyOutput, PreferenceOutput


class _Settled(nn.Module):
    """A function with its settings bound. Raises TypeError at construction for a setting that it does not have."""

    function: Callable[..., Any]
    at_call: tuple[str, ...] = ()

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        parameters = inspect.signature(self.function).parameters
        allowed = {n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY} - set(self.at_call)
        unknown = sorted(set(settings) - allowed)
        if unknown:
            raise TypeError(f"{type(self).__name__}: no setting {unknown[0]!r}; there are {', '.join(sorted(allowed))}")
        self.settings = settings

    def extra_repr(self) -> str:
        """The settings, for print(model)."""
        return ", ".join(f"{k}={v!r}" for k, v in self.settings.items())


class SelectiveLogProbs(_Settled):
    """`selective_logprobs` with its settings bound."""

    function = staticmethod(selective_logprobs)

    def forward(
        self,
        logits: Tensor,  # (N, V)
        labels: Tensor,  # (N,)
    ) -> LogProbs:
        """See `selective_logprobs`."""
        return selective_logprobs(logits, labels, **self.settings)


class LinearLogProbs(_Settled):
    """`linear_logprobs` with its settings bound; the head's weight stays with the model."""

    function = staticmethod(linear_logprobs)
    at_call = ("bias",)

    def forward(
        self,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        labels: Tensor,  # (N,)
        bias: Tensor | None = None,  # (V,)
    ) -> LogProbs:
        """See `linear_logprobs`."""
        return linear_logprobs(hidden, weight, labels, bias=bias, **self.settings)


class PreferenceLoss(_Settled):
    """`preference_loss` with its settings bound."""

    function = staticmethod(preference_loss)
    at_call = ("lengths", "normalizer")

    def forward(
        self,
        policy_logps: Tensor,  # (2P,)
        ref_logps: Tensor | None,  # (2P,)
        lengths: Tensor | None = None,  # (2P,)
        normalizer: float | Tensor | None = None,
    ) -> PreferenceOutput:
        """See `preference_loss`."""
        return preference_loss(policy_logps, ref_logps, lengths=lengths, normalizer=normalizer, **self.settings)


class LinearPreferenceLoss(_Settled):
    """`linear_preference_loss` with its settings bound; the head's weight stays with the model."""

    function = staticmethod(linear_preference_loss)
    at_call = ("bias", "normalizer")

    def forward(
        self,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        labels: Tensor,  # (N,)
        cu_seqlens: Sequence[int] | Tensor,  # (2P + 1,) on the host
        ref_logps: Tensor | None,  # (2P,)
        bias: Tensor | None = None,  # (V,)
        normalizer: float | Tensor | None = None,
    ) -> PreferenceOutput:
        """See `linear_preference_loss`."""
        return linear_preference_loss(
            hidden, weight, labels, cu_seqlens, ref_logps, bias=bias, normalizer=normalizer, **self.settings
        )


_TOKENS = ("ref_logps", "old_logps", "sampler_logps")


class PolicyLoss(_Settled):
    """`policy_loss` with its settings bound."""

    function = staticmethod(policy_loss)
    at_call = _TOKENS

    def forward(
        self,
        logps: Tensor,  # (N,)
        advantages: Tensor,  # (N,)
        weights: Tensor,  # (N,)
        ref_logps: Tensor | None = None,  # (N,)
        old_logps: Tensor | None = None,  # (N,)
        sampler_logps: Tensor | None = None,  # (N,)
    ) -> PolicyOutput:
        """See `policy_loss`."""
        return policy_loss(
            logps, advantages, weights, ref_logps=ref_logps, old_logps=old_logps, sampler_logps=sampler_logps,
            **self.settings,
        )  # fmt: skip


class LinearPolicyLoss(_Settled):
    """`linear_policy_loss` with its settings bound; the head's weight stays with the model."""

    function = staticmethod(linear_policy_loss)
    at_call = ("bias", *_TOKENS)

    def forward(
        self,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        labels: Tensor,  # (N,)
        advantages: Tensor,  # (N,)
        weights: Tensor,  # (N,)
        ref_logps: Tensor | None = None,  # (N,)
        old_logps: Tensor | None = None,  # (N,)
        sampler_logps: Tensor | None = None,  # (N,)
        bias: Tensor | None = None,  # (V,)
    ) -> PolicyOutput:
        """See `linear_policy_loss`."""
        return linear_policy_loss(
            hidden, weight, labels, advantages, weights, ref_logps=ref_logps, old_logps=old_logps,
            sampler_logps=sampler_logps, bias=bias, **self.settings,
        )  # fmt: skip


class WeightAverage(nn.Module):
    """The float32 exponential moving average of a list of parameters."""

    def __init__(self, params: Iterable[Tensor], decay: float, impl: str = "auto") -> None:
        super().__init__()
        self.decay, self.impl = decay, impl
        self._names = []
        for i, p in enumerate(params):
            self._names.append(f"shadow_{i}")
            self.register_buffer(self._names[-1], p.detach().to(torch.float32, copy=True).contiguous())

    @property
    def shadow(self) -> list[Tensor]:
        """The averages, in the order of the parameters."""
        return [self.get_buffer(n) for n in self._names]

    def update_(self, params: Iterable[Tensor], publish: Sequence[Tensor | None] | None = None) -> None:
        """One step of `ema_update_`."""
        ema_update_(self.shadow, list(params), self.decay, publish=publish, impl=self.impl)
