"""What differs between the versions of vLLM on the worker's side of publishing, in one place.

0.24 builds a weight-transfer engine from (config, parallel_config, model), 0.27 and later from (config, vllm_config,
device, model). Their life cycles differ as well (who drives it, how many calls), and so do the methods that a subclass
must have; we take none of them: vLLM's object is our way into a worker right after its model is loaded, and everything
later goes through `collective_rpc`, which all of them have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from advgame.publish.record import reasons_against


@dataclass(frozen=True)
class Place:
    """One worker: its model, where it computes, and which part of the model it holds."""

    model: nn.Module
    device: torch.device
    rank: int
    world_size: int
    dtype: torch.dtype
    refused: tuple[str, ...]


def place_of(arguments: tuple[Any, ...]) -> Place:
    """From whatever a version hands to a weight-transfer engine behind its own config."""
    model = next(a for a in arguments if isinstance(a, nn.Module))
    devices = [a for a in arguments if isinstance(a, torch.device)]
    others = [a for a in arguments if not isinstance(a, nn.Module | torch.device)]
    whole = next((a for a in others if hasattr(a, "parallel_config")), None) or _current_config()
    parallel = whole.parallel_config if whole is not None else others[0]
    return _place(model, devices[0] if devices else None, parallel, whole)


def place_of_worker(worker: Any) -> Place:
    """From a worker, for calls that arrive through `collective_rpc`."""
    config = worker.vllm_config
    return _place(worker.model_runner.get_model(), getattr(worker, "device", None), config.parallel_config, config)


def _place(model: nn.Module, device: torch.device | None, parallel: Any, whole: Any) -> Place:
    first = next(model.parameters())
    if whole is not None:
        config = whole.model_config
        quantised = config.quantization if getattr(whole, "quant_config", None) is not None else None
        refused = reasons_against(
            quantised=quantised, mla=bool(config.use_mla), experts=bool(getattr(config, "is_moe", False))
        )
        dtype = config.dtype
    else:
        # without vLLM's config the model's own folder still says whether it was quantised; plans refuse the rest
        said = getattr(getattr(model, "config", None), "quantization_config", None)
        refused = reasons_against(quantised=None if said is None else str(said), mla=False, experts=False)
        dtype = first.dtype
    return Place(model, device or first.device, parallel.rank, parallel.world_size, dtype, tuple(refused))


def _current_config() -> Any:
    try:
        from vllm.config import get_current_vllm_config_or_none
    except ImportError:
        return None
    return get_current_vllm_config_or_none()
