"""An engine's parameters move into memory of the trainer, and are compared with what the trainer wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from advgame.publish import arena
from advgame.publish.arena import checksum, flat_view, mapped
from advgame.publish.plan import Copy, Plan
from advgame.publish.record import view_of


def open_part(memory: Mapping[str, Any], device: torch.device) -> Tensor:
    """The uint8 tensor that a grant describes, in this process. OSError, ValueError or RuntimeError: it cannot be."""
    if memory["kind"] == "cuda":
        from advgame.publish.cuda_memory import open_shared

        return open_shared(memory, device)
    start, size = memory["start"], memory["size"]
    return mapped(memory["path"], start + size)[start : start + size]


def bind(model: nn.Module, plan: Plan, part: Tensor) -> dict[str, Tensor]:
    """Moves the storages of the plan into `part`; parameters become views of it, tied ones stay tied.

    Returns the storages as flat tensors by name.
    """
    flats = {}
    offsets, _ = plan.layout()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    moved: set[int] = set()  # a tied parameter is one object under two names, or two objects on one storage
    for storage in plan.storages:
        flat = flat_view(part, offsets[storage.name], storage.elements, getattr(torch, storage.dtype))
        flats[storage.name] = flat
        for name in storage.parameters:
            if id(parameters[name]) in moved:
                continue
            old = parameters[name].data
            new = torch.as_strided(flat, old.shape, old.stride(), flat.storage_offset() + old.storage_offset())
            new.copy_(old)
            parameters[name].data = new
            moved.add(id(parameters[name]))
    return flats


def flats_of(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Each storage of the plan as a flat tensor, of a model that was not moved."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {s.name: torch.as_strided(parameters[s.parameters[0]].data, (s.elements,), (1,), 0) for s in plan.storages}


def checksums(model: nn.Module, plan: Plan) -> dict[str, int]:
    """A checksum of every storage, read through the model's own parameters."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return arena.checksums({storage.name: parameters[storage.parameters[0]].data for storage in plan.storages})


def copied_checksums(plan: Plan, flats: Mapping[str, Tensor]) -> dict[str, int]:
    """A checksum of every copy's target, by number and name; `flats`: storages as flat tensors."""
    return {copy_name(i, c): checksum(view_of(flats[c.target], c.into)) for i, c in enumerate(plan.copies)}


def copy_name(number: int, copy: Copy) -> str:
    return f"{number}: {copy.source} -> {copy.target}"


def compare(mine: Mapping[str, int], theirs: Mapping[str, int]) -> None:
    """RuntimeError naming the first place where the engine holds something else than was written."""
    wrong = sorted(name for name in mine if mine[name] != theirs.get(name))
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {len(mine)} places differ from what was written, first {wrong[0]}")
