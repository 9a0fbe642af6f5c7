"""Tensors of a player's files in a checkpoint, read into what is there: whole, or the pieces that a rank holds.

Files are mapped into memory: of a tensor only what is copied is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from advgame.learn.layout import Span
from advgame.learn.part_files import numbered
from advgame.rollout.chat import first_line


def files_of(folder: Path, stem: str) -> list[Path]:
    """`stem`.safetensors, or all files into which it is divided. Raises FileNotFoundError with the name of one that is
    not there."""
    if (alone := folder / f"{stem}.safetensors").is_file():
        return [alone]
    found = sorted(folder.glob(f"{stem}-?????-of-?????.safetensors"))
    of = int(found[0].stem[-5:]) if found else 1
    files = [folder / numbered(stem, number, of) for number in range(of)]
    for path in files:
        if path not in found:
            raise FileNotFoundError(f"{path.name} is missing")
    return files


def stored(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of everything in `files`, not yet read. Raises SafetensorError, with a file's name, for a damaged
    or short one."""
    for path in files:
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                    yield name, opened.get_tensor(name)
        except SafetensorError as error:
            raise SafetensorError(f"{path.name}: {first_line(error)}") from error


@torch.no_grad()
def fill(into: Tensor, tensor: Tensor, span: Span | None) -> None:
    """Copies a stored tensor, or the span of its flattened elements that `into` holds (1-D)."""
    if span is not None:
        start, length = span
        tensor = tensor.reshape(-1)[start : start + length]
    if tensor.shape != into.shape:
        raise SafetensorError(f"a tensor is of shape {list(tensor.shape)}, not {list(into.shape)}")
    into.copy_(tensor)


def copy_tensors(files: Iterable[Path], into: Mapping[str, Tensor], spans: Mapping[str, Span] | None = None) -> None:
    """Fills `into` by name, one tensor at a time. spans: of each, where `into` holds pieces; empty ones are not read.
    Raises SafetensorError when one is not stored."""
    missing = _wanted(into)
    for name, tensor in stored(files):
        if name in missing:
            fill(missing.pop(name), tensor, None if spans is None else spans[name])
    if missing:
        raise SafetensorError(f"{next(iter(missing))} is missing")


def copy_model(
    folder: Path, model: PreTrainedModel, into: Mapping[str, Tensor], spans: Mapping[str, Span] | None = None
) -> None:
    """Fills `into`, by `model`'s own tensor names, from a Hugging Face folder. spans: as in `copy_tensors`."""
    missing = _wanted(into)
    # Tied weights are stored once, under any of their names.
    names: dict[int, set[str]] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), set()).add(key)
    canonical = {key: own for own, tensor in tensors_of(model).items() for key in names[id(tensor)]}
    for key, tensor in stored(files_of(folder, "model")):
        own = canonical.get(key)
        if own in missing:
            fill(missing.pop(own), tensor, None if spans is None else spans[own])
    if missing:
        # Families that transformers stores under other names than it trains (fused experts): let it convert.
        how = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
        made, found = type(model).from_pretrained(folder, **how)
        if found["missing_keys"]:
            raise SafetensorError(f"{min(found['missing_keys'])} is missing")
        loaded = tensors_of(made)
        for own, tensor in missing.items():
            fill(tensor, loaded[own], None if spans is None else spans[own])


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All that is saved: parameters and persistent buffers, tied ones once."""
    found: dict[int, tuple[str, Tensor]] = {}
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **model.state_dict(keep_vars=True)}
    for name, tensor in named.items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def _wanted(into: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in into.items() if tensor.numel()}
