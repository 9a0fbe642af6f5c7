"""One line that gives a Hugging Face causal language model fused losses: `patch_model(model)`.

Afterwards `model(..., labels=labels, fused="logprobs")` returns the token log-probs of the labelled positions and
`fused="preference"` a pairwise loss, both without logits; every other call is the model's own. The call goes
through the model's forward, so DDP, FSDP and DeepSpeed wrappers see it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from advgame_kernels._checks import describe, one_of, refuse
from advgame_kernels.linear_logprobs import linear_logprobs
from advgame_kernels.linear_preference import linear_preference_loss, to_device
from advgame_kernels.types import LogProbs, PreferenceOutput


def _keywords(function: Callable[..., Any]) -> set[str]:
    """Settings of a linear function that a call of the patched model may give; the others come from the model."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"bias", "softcap", "process_group"}


OURS = {
    "logprobs": _keywords(linear_logprobs) | {"lengths"},
    "preference": _keywords(linear_preference_loss) | {"ref_logps", "lengths"},
}
IGNORED = -100  # the label of a position that nobody scores
# Other multipliers of the logits, by the name that a model's configuration gives them.
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")


@dataclass(frozen=True)
class HeadSettings:
    """How a model's configuration says its logits are made."""

    softcap: float
    scale: float

    def keywords(self, temperature: float) -> dict[str, float]:
        """As arguments of the linear functions, which cap first and divide then."""
        if self.softcap and self.scale != 1.0:
            refuse("model", "a head with a logit scale or a soft cap, not both", self)
        return {"softcap": self.softcap, "temperature": temperature / self.scale}


def head_settings(config: Any) -> HeadSettings:
    """Soft cap and scale of the logits from a transformers configuration (the text part of a multimodal one)."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    for name in SCALES:
        value = getattr(text, name, None)
        if value is not None:
            scale = float(value)
    divisor = getattr(text, "logits_scaling", None)
    if divisor is not None:
        # HyperCLOVA X multiplies by what Granite and MiniCPM3 divide by
        scale = float(divisor) if text.model_type == "hyperclovax" else 1.0 / float(divisor)
    return HeadSettings(float(getattr(text, "final_logit_softcapping", None) or 0.0), scale)


@contextmanager
def gathered_head(*parameters: Tensor | None) -> Iterator[None]:
    """Whole parameters inside, whatever DeepSpeed's ZeRO-3 has partitioned; does nothing for plain ones.

    One gather a call is enough: the losses compute their gradients in the forward pass, and what
    `linear_logprobs` needs again in its backward pass it holds on to.
    """
    partitioned = [p for p in parameters if p is not None and hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    deepspeed = importlib.import_module("deepspeed")
    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def _plain_head(model: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the output embedding; refuses what would make the product with `weight` wrong."""
    head = model.get_output_embeddings()
    if head is None:
        refuse("model", "a causal language model with output embeddings", type(model).__name__)
    if hasattr(head, "base_layer"):
        refuse(
            "model", "an LM head without an adapter (its product is not that of `weight` alone)", type(head).__name__
        )
    return head.weight, getattr(head, "bias", None)


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """What the model's own head would compute in: autocast's dtype where that is on, else the weight's."""
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


class Scored(NamedTuple):
    """The positions of a padded batch that predict a scored token, packed."""

    rows: Tensor  # (N, H)
    targets: Tensor  # (N,) their labels
    places: Tensor  # (N,) where they stand in the flattened (B, L − 1) positions
    lengths: list[int]  # scored tokens of each sequence


def compact(hidden: Tensor, labels: Tensor, lengths: Sequence[int] | None) -> Scored:
    """Scored positions of (B, L, H) hidden states by their (B, L) labels; with `lengths` the host waits for nothing.

    Raises ValueError for labels that are not of the hidden states' positions, and where `lengths` are not those of the
    labels (a device assertion on a GPU).
    """
    if labels.dtype != torch.int64 or labels.shape != hidden.shape[:2] or labels.device != hidden.device:
        refuse("labels", f"int64 labels of shape {tuple(hidden.shape[:2])} on {hidden.device}", describe(labels))
    mask = labels[:, 1:] != IGNORED
    counts = mask.sum(dim=1)
    if lengths is None:
        lengths = counts.tolist()  # the one host sync
    elif len(lengths) != labels.shape[0]:
        refuse("lengths", f"one number a sequence, {labels.shape[0]}", len(lengths))
    else:
        same = (counts == to_device(list(lengths), labels.device)).all()
        if labels.device.type == "cpu" and not same:
            refuse("lengths", f"the scored tokens of each sequence, {counts.tolist()}", list(lengths))
        if labels.device.type == "cuda":
            torch._assert_async(same, "lengths: expected the scored tokens of each sequence")
    # A boolean index would ask the GPU how many there are; the k-th scored place is found among running counts.
    wanted = torch.arange(1, sum(lengths) + 1, device=labels.device)
    places = torch.searchsorted(mask.flatten().cumsum(0), wanted)
    positions = places + places // max(1, mask.shape[1])  # each sequence has one position more than it has targets
    rows = hidden.flatten(0, 1).index_select(0, positions)
    return Scored(rows, labels.flatten().index_select(0, positions + 1), places, list(lengths))


def _logprobs(
    model: Any, hidden: Tensor, labels: Tensor, lengths: Sequence[int] | None, settings: dict[str, Any]
) -> LogProbs:
    weight, bias = _plain_head(model)
    scored = compact(hidden, labels, lengths)
    with gathered_head(weight, bias):
        out = linear_logprobs(scored.rows.to(_compute_dtype(weight)), weight, scored.targets, bias=bias, **settings)
    shape = (labels.shape[0], labels.shape[1] - 1)
    return LogProbs(*(x.new_zeros(shape[0] * shape[1]).index_copy(0, scored.places, x).view(shape) for x in out))


def _preference(
    model: Any,
    hidden: Tensor,
    labels: Tensor,
    ref_logps: Tensor | None,
    lengths: Sequence[int] | None,
    settings: dict[str, Any],
) -> PreferenceOutput:
    weight, bias = _plain_head(model)
    scored = compact(hidden, labels, lengths)
    bounds = [0, *accumulate(scored.lengths)]
    rows = scored.rows.to(_compute_dtype(weight))
    with gathered_head(weight, bias):
        return linear_preference_loss(rows, weight, scored.targets, bounds, ref_logps, bias=bias, **settings)


def patch_model(model: Any) -> Any:
    """Wrap `model.forward` of a transformers causal language model, and return the model.

    `fused="logprobs"`: LogProbs of shape (B, L − 1), zero where the shifted label is −100; settings: those of
    `linear_logprobs`. `fused="preference"`: rows 2p and 2p + 1 of the batch are the chosen and rejected sequence
    of pair p, prompts labelled −100; further arguments: `ref_logps` and the settings of `linear_preference_loss`.
    Both take `lengths` (scored tokens of each row, on the host; without them they are read from the GPU, the one
    wait of the call) and `temperature`; soft cap and scale of the logits come from the model's configuration.
    Patch before wrapping with PEFT. Patching twice changes nothing.

    Raises ValueError for a model without a plain LM head (an adapter on it would silently be left out of the
    product).
    """
    if getattr(model, "_advgame_patched", False):
        return model
    original = model.forward
    head = head_settings(model.config)
    _plain_head(model)

    @functools.wraps(original)
    def forward(*args: Any, fused: str | None = None, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if fused is None:
            return original(*args, **kwargs) if labels is None else original(*args, labels=labels, **kwargs)
        one_of("fused", fused, ("logprobs", "preference"))
        if labels is None:
            refuse("labels", f"(B, L) labels with {IGNORED} where no token is scored", None)
        ours = {k: kwargs.pop(k) for k in list(kwargs) if k in OURS[fused]}
        settings = head.keywords(ours.pop("temperature", 1.0)) | ours
        kwargs["use_cache"] = False
        hidden = model.base_model(*args, **kwargs).last_hidden_state
        lengths = settings.pop("lengths", None)
        if fused == "logprobs":
            return _logprobs(model, hidden, labels, lengths, settings)
        return _preference(model, hidden, labels, settings.pop("ref_logps", None), lengths, settings)

    model.forward = forward
    model._advgame_patched = True
    return model
