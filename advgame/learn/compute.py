"""How a decoder's passes are run: activations kept or computed again, layers compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from advgame.errors import InputError


def checkpoint_layers(model: PreTrainedModel, field: str) -> None:
    """Makes every decoder layer keep its input only and compute the rest again in the backward pass.

    transformers' own switch asks for training mode, and with it dropout; players train in eval mode.
    InputError if the decoder has no list of layers.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise InputError(f"{field}: {type(model).__name__} has no list of layers; set learn.checkpointing: false")
    for layer in layers:
        # no layer draws random numbers, so none of their state is kept
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def compiled_decoder(model: PreTrainedModel) -> Callable[..., Any]:
    """The decoder through torch.compile: what lies between attentions, for any number of tokens."""
    return torch.compile(model.get_decoder(), dynamic=True)
