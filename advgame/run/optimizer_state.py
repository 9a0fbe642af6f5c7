"""An optimizer's state as named tensors and JSON, and back in place: what pickle would do, without pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from advgame.errors import InputError


@dataclass(frozen=True)
class Packed:
    """What `pack_optimizer` gives."""

    tensors: Mapping[str, Tensor]
    described: Mapping[str, Any]


def pack_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors named `<entry>/<parameter>`, description): all that `unpack_optimizer` needs.

    The description holds, per parameter group, its hyperparameters and the parameters' names in order, and
    the entries of the state that are plain numbers. Raises InputError on a parameter that `parameters` does
    not name.
    """
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    for number, group in enumerate(optimizer.param_groups):
        members = []
        for parameter in group["params"]:
            name = name_of.get(id(parameter))
            if name is None:
                raise InputError(f"optimizer group {number}: holds a tensor that is no parameter of the model")
            members.append(name)
            for entry, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{entry}/{name}"] = value.detach()
                else:
                    scalars[f"{entry}/{name}"] = value
        options = {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names")}
        groups.append({"params": members, "options": options})
    return tensors, {"kind": type(optimizer).__name__, "groups": groups, "scalars": scalars}


def check_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    described: Mapping[str, Any],
    where: str,
) -> None:
    """Raises InputError, changing nothing, unless `optimizer` has the `described` kind and grouping."""
    kind = type(optimizer).__name__
    if kind != described["kind"]:
        raise InputError(f"{where}: optimizer is {described['kind']} in the checkpoint, {kind} in this run")
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    live = [[name_of.get(id(p), "?") for p in group["params"]] for group in optimizer.param_groups]
    saved = [group["params"] for group in described["groups"]]
    if live != saved:
        a, b = [sum(map(len, groups)) for groups in (saved, live)]
        raise InputError(
            f"{where}: optimizer has {len(saved)} groups with {a} parameters in the checkpoint, {len(live)} "
            f"with {b} in this run, or another order; build it as the saved run did"
        )


def unpack_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    described: Mapping[str, Any],
) -> None:
    """Puts what `pack_optimizer` gave into `optimizer`, which `check_optimizer` accepted.

    Tensors that exist are filled in place; missing ones are created as torch.optim would: moments on the
    parameter's device, the `step` count on the CPU unless the group is fused or capturable. A parameter
    without saved state loses the state it has now.
    """
    moments = _by_parameter(tensors)
    scalars = _by_parameter(described["scalars"])
    for group, saved in zip(optimizer.param_groups, described["groups"], strict=True):
        for key, value in saved["options"].items():
            _set_option(group, key, value)
        step_on_device = bool(group.get("fused") or group.get("capturable"))
        for name, parameter in zip(saved["params"], group["params"], strict=True):
            state = optimizer.state[parameter]
            fresh: dict[str, Any] = dict(scalars.get(name, {}))
            for entry, tensor in moments.get(name, {}).items():
                existing = state.get(entry)
                if isinstance(existing, Tensor) and _alike(existing, tensor):
                    existing.detach().copy_(tensor)
                    fresh[entry] = existing
                else:
                    device = torch.device("cpu") if entry == "step" and not step_on_device else parameter.device
                    fresh[entry] = tensor.to(device, copy=True)
            state.clear()
            state.update(fresh)
            if not fresh:
                del optimizer.state[parameter]


def _by_parameter(entries: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`<entry>/<name>` to name -> entry -> value; entry names of optimizers hold no '/'."""
    grouped: dict[str, dict[str, Any]] = {}
    for key, value in entries.items():
        entry, name = key.split("/", 1)
        grouped.setdefault(name, {})[entry] = value
    return grouped


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _set_option(group: dict[str, Any], key: str, value: Any) -> None:
    """One hyperparameter; a tensor learning rate is filled in place, JSON's lists become tuples again."""
    current = group.get(key)
    if isinstance(current, Tensor):
        current.fill_(value)
    else:
        group[key] = tuple(value) if isinstance(value, list) else value
