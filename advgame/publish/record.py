"""Records a copy plan from a model's own `load_weights`, called with meta tensors and without executing its copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from advgame.publish.plan import ITEM_BYTES, Copy, Fill, Plan, Region, Source, Storage, problems


class PlanRefused(Exception):
    """The engine's weights cannot be written directly; `reasons` say why, one each."""

    def __init__(self, reasons: Sequence[str]):
        super().__init__("; ".join(reasons))
        self.reasons = tuple(reasons)


class _Recorder(TorchDispatchMode):
    """Notes copies into known storages instead of making them; everything else runs (views and meta arithmetic)."""

    def __init__(self, targets: dict[int, str], sources: dict[int, str]):
        super().__init__()
        self.targets, self.sources = targets, sources
        self.copies: list[Copy] = []
        self.fills: list[Fill] = []
        self.reasons: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name
        if name.endswith("_") and args and isinstance(args[0], Tensor):
            target = self.targets.get(_storage(args[0]))
            if target is not None:
                self._note(name, target, args)
                return args[0]
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, target: str, args: Any) -> None:
        into = region_of(args[0])
        if into.size == 0:  # a rank without a share of a small vocabulary
            return
        if name == "aten::copy_":
            source = self.sources.get(_storage(args[1]))
            if source is None:
                self.reasons.append(f"{target} is computed from the published weights, not copied")
                return
            taken = args[1].expand(args[0].shape)
            self.copies.append(Copy(source, region_of(taken), target, into))
        elif name in ("aten::fill_", "aten::zero_"):
            value = float(args[1]) if name == "aten::fill_" else 0.0
            self.fills.append(Fill(target, into, value))
        else:
            self.reasons.append(f"{target} is changed by {name} while loading")


def record(
    model: nn.Module, sources: Sequence[Source], *, name: str, dtype: torch.dtype, rank: int = 0, world_size: int = 1
) -> Plan:
    """The plan of `model.load_weights` for tensors of these names and shapes.

    dtype: of the source tensors as the loader sees them. The model's weights are neither read nor written; it may live
    on the meta device. Raises PlanRefused with every reason found.
    """
    storages: dict[int, list[tuple[str, Tensor]]] = {}
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        storages.setdefault(_storage(parameter), []).append((parameter_name, parameter))
    reasons = [f"{held[0][0]} was emptied by weight prepacking" for held in storages.values() if not held[0][1].numel()]
    unknown = {str(held[0][1].dtype) for held in storages.values()} - {f"torch.{known}" for known in ITEM_BYTES}
    reasons += [f"parameters of {kind}" for kind in sorted(unknown)]
    if reasons:
        raise PlanRefused(reasons[:8])
    metas = [(source.name, torch.empty(source.shape, dtype=dtype, device="meta")) for source in sources]
    targets = {key: held[0][0] for key, held in storages.items()}
    recorder = _Recorder(targets, {_storage(meta): source for source, meta in metas})
    try:
        with recorder, torch.no_grad():
            model.load_weights(iter(metas))  # type: ignore[operator]
    except (RuntimeError, NotImplementedError, ValueError, KeyError, AssertionError, AttributeError) as error:
        said = " ".join(str(error).split())
        raise PlanRefused([f"load_weights refuses these weights: {type(error).__name__}: {said}"]) from error
    made = tuple(
        Storage(
            held[0][0],
            str(held[0][1].dtype).removeprefix("torch."),
            held[0][1].untyped_storage().nbytes() // held[0][1].element_size(),
            tuple(parameter_name for parameter_name, _ in held),
        )
        for held in storages.values()
    )
    plan = Plan(name, rank, world_size, tuple(sources), made, tuple(recorder.copies), tuple(recorder.fills))
    found = [*recorder.reasons, *problems(plan)]
    if found:
        raise PlanRefused(found)
    return plan


def region_of(tensor: Tensor) -> Region:
    return Region(int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))


def view_of(flat: Tensor, region: Region) -> Tensor:
    """The region of a flat tensor that starts at its storage's first element, or of a part of a larger arena."""
    return torch.as_strided(flat, region.shape, region.stride, flat.storage_offset() + region.offset)


def reasons_against(*, quantised: str | None, mla: bool, experts: bool) -> list[str]:
    """Why a model of vLLM is refused before anything is recorded: its weights are not the published ones."""
    reasons = []
    if quantised:
        reasons.append(f"the engine's weights are quantised ({quantised})")
    if mla:
        reasons.append("latent attention (MLA) keeps weights derived from the published ones")
    if experts:
        reasons.append("experts may be reshuffled after loading")
    return reasons


def _storage(tensor: Tensor) -> int:
    """Identity of a tensor's storage; unlike an address it also tells meta tensors apart."""
    return tensor.untyped_storage()._cdata
