"""Low-rank adapters (LoRA, through peft) in a player: what learns, averages and is saved is small; what is served is
the merged weight W + (alpha / rank) B A.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from advgame.errors import InputError
from advgame.learn.settings import LoraSettings
from advgame.rollout.chat import first_line

_ADAPTER = "default"
_SAVED = "base_model.model."
"""peft's own prefix in the files of an adapter."""


def add_adapters(model: PreTrainedModel, settings: LoraSettings, field: str) -> None:
    """Puts fresh adapters (B = 0) beside the target layers and freezes everything else, in place.

    InputError where no layer bears a target's name, or a target is the LM head or an embedding.
    """
    if find_spec("peft") is None:
        raise InputError("learn.lora: adapters need peft; pip install peft, or leave learn.lora out")
    from peft import inject_adapter_in_model

    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    config = _config(settings, targets, lora_dropout=0.0)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # every start of a run begins from the same A
            inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    except ValueError as error:
        raise InputError(f"learn.lora.targets: {field}: {first_line(error)}") from error
    head = model.get_output_embeddings()
    for name, layer in _layers(model):
        # the fused losses read the head's own weight: an adapter beside it would be left out in silence
        if layer is head or not isinstance(layer.base_layer, nn.Linear):
            raise InputError(f"learn.lora.targets: {name} is no linear layer of the decoder; leave it out")


def _config(settings: LoraSettings, targets: str | list[str], **more: Any) -> Any:
    """peft's LoraConfig; alpha, which it divides by the rank, may be any number."""
    from peft import LoraConfig

    alpha: Any = settings.alpha
    return LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=targets, **more)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that peft has put around others."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "lora_B"):
            yield name, module


def disabled(model: nn.Module) -> dict[str, Tensor]:
    """Adapter weights that change nothing: the initial model, by the names of the parameters that they stand for."""
    return {n: torch.zeros_like(p) for n, p in model.named_parameters() if n.endswith(f".lora_B.{_ADAPTER}.weight")}


def plain_name(name: str) -> str:
    """A parameter's name in the model without adapters."""
    return name.replace(".base_layer.", ".")


def is_adapter(name: str) -> bool:
    return ".lora_" in name and name.endswith(f".{_ADAPTER}.weight")


def live_adapters(model: nn.Module) -> dict[str, Tensor]:
    """The model's own adapter weights, by parameter name."""
    return {n: p.data for n, p in model.named_parameters() if is_adapter(n)}


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The frozen parameters under the names that they have without adapters; shapes and types are those served."""
    return {plain_name(n): p for n, p in model.named_parameters() if not is_adapter(n)}


@torch.no_grad()
def merged(model: nn.Module, adapters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(plain name, merged weight) of every parameter, one at a time: an adapted one is made when it is asked for.

    `adapters` holds adapter weights by parameter name: the live ones, or their average.
    """
    layers = {f"{name}.base_layer.weight": (name, layer) for name, layer in _layers(model)}
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            continue
        if name not in layers:
            yield plain_name(name), parameter.detach()
            continue
        prefix, layer = layers[name]
        a, b = (adapters[f"{prefix}.lora_{x}.{_ADAPTER}.weight"] for x in "AB")
        yield plain_name(name), torch.addmm(parameter, b, a, alpha=layer.scaling[_ADAPTER])  # type: ignore[index,arg-type]


def save_adapters(folder: Path, adapters: Mapping[str, Tensor], settings: LoraSettings) -> None:
    """An adapter folder as peft reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_saved_name(n): t.detach().cpu().contiguous() for n, t in adapters.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({n.split(".lora_")[0].rsplit(".", 1)[-1] for n in adapters})
    config = _config(settings, targets, task_type="CAUSAL_LM")
    config.inference_mode = True
    config.save_pretrained(str(folder))


@torch.no_grad()
def load_adapters(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Fills adapter weights, bit for bit, from a folder of `save_adapters`."""
    stored = load_file(folder / "adapter_model.safetensors")
    for name, tensor in into.items():
        tensor.copy_(stored[_saved_name(name)])


def _saved_name(name: str) -> str:
    return _SAVED + name.replace(f".{_ADAPTER}.weight", ".weight")
