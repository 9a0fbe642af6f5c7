"""The engine's side of publishing: vLLM's weight-transfer engine of our backend, and what the trainer calls besides.

Runs inside vLLM's worker processes. Nothing here is imported by the trainer's process.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from advgame.publish import plugin
from advgame.publish.arena import checksum, flat_view, mapped
from advgame.publish.plan import Plan, Source
from advgame.publish.record import PlanRefused, reasons_against, record

plugin.register()


@dataclass
class ArenaInfo(WeightTransferInitInfo):
    """path: the shared file. offset: byte where this rank's part begins, by rank. hashes: plan hash by rank."""

    path: str
    size: int
    offsets: list[int]
    hashes: list[str]


@dataclass
class Written(WeightTransferUpdateInfo):
    """The trainer wrote the arena; `checksums` (by rank, storage -> crc32) are compared when they are there."""

    checksums: list[dict[str, int]] | None = None


class SharedMemoryEngine(WeightTransferEngine[ArenaInfo, Written]):
    """Lets every parameter live in the trainer's arena; a publish is then a write of the trainer and nothing here."""

    init_info_cls = ArenaInfo
    update_info_cls = Written

    def __init__(self, config: Any, *rest: Any) -> None:
        super().__init__(config, *rest)
        self.plan: Plan | None = None
        self.rank = self.vllm_config.parallel_config.rank

    def init_transfer_engine(self, init_info: ArenaInfo) -> None:
        """Checks that both sides hold the same plan, moves the weights into the arena and rebinds the parameters."""
        if self.plan is None:
            raise RuntimeError("advgame_plan has to be called first")
        if init_info.hashes[self.rank] != self.plan.hash:
            raise RuntimeError(f"the trainer's plan {init_info.hashes[self.rank]} is not the engine's {self.plan.hash}")
        arena = mapped(init_info.path, init_info.size)
        bind(self.model, self.plan, arena, init_info.offsets[self.rank])

    def start_weight_update(self) -> None:
        """Nothing to prepare: the trainer writes in place."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As vLLM's, without the device synchronisation, for which a CPU has no device."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Written) -> None:
        if update_info.checksums is None:
            return
        assert self.plan is not None
        mine, theirs = checksums(self.model, self.plan), update_info.checksums[self.rank]
        wrong = sorted(name for name in mine if mine[name] != theirs.get(name))
        if wrong:
            raise RuntimeError(f"{len(wrong)} storages differ from what was written, first {wrong[0]}")

    def finish_weight_update(self) -> None:
        """Nothing to finish: loading changed no layer."""

    def shutdown(self) -> None:
        """The arena is released with the parameters that live in it."""


class PublishWorker:
    """vLLM's `worker_extension_cls`: methods that the trainer calls with `collective_rpc`."""

    def advgame_guard(self, parent: int) -> int:
        """Leaves Ctrl-C to the trainer, which finishes its step, and dies with it. Returns the process id."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # PR_SET_PDEATHSIG; a worker two levels down is reached through its own parent
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
        if os.getppid() == 1 and parent != 1:  # the trainer died before this call
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()

    def advgame_plan(self, model_name: str, sources: list[Any]) -> dict[str, Any]:
        """{"plan": tree} or {"refused": [reasons]} for tensors of these (name, shape)."""
        model, config = _model_of(self), self.vllm_config  # type: ignore[attr-defined]
        quantised = config.model_config.quantization if config.quant_config is not None else None
        reasons = reasons_against(
            quantised=quantised, mla=config.model_config.use_mla, experts=bool(config.model_config.is_moe)
        )
        if reasons:
            return {"refused": reasons}
        parallel = config.parallel_config
        try:
            plan = record(
                model,
                [Source(name, tuple(shape)) for name, shape in sources],
                name=model_name,
                dtype=config.model_config.dtype,
                rank=parallel.rank,
                world_size=parallel.world_size,
            )
        except PlanRefused as refusal:
            return {"refused": list(refusal.reasons)}
        engine = self.weight_transfer_engine  # type: ignore[attr-defined]
        if isinstance(engine, SharedMemoryEngine):
            engine.plan = plan
        return {"plan": plan.to_tree()}

    def advgame_load(self, path: str, size: int, entries: list[Any]) -> None:
        """vLLM's own loader over tensors in a shared file; entries: (name, dtype, shape, byte offset)."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        arena = mapped(path, size)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name, dtype, shape, offset in entries:
                elements = 1
                for n in shape:
                    elements *= n
                # the loader may keep what it is given until a layer is whole; the arena changes under it later
                yield name, flat_view(arena, offset, elements, getattr(torch, dtype)).view(*shape).clone()

        model, config = _model_of(self), self.vllm_config  # type: ignore[attr-defined]
        with set_current_vllm_config(config), torch.no_grad():
            initialize_layerwise_reload(model)
            model.load_weights(tensors())  # type: ignore[operator]
            finalize_layerwise_reload(model, config.model_config)

    def advgame_load_one(self, name: str, dtype: str, shape: list[int], data: bytes) -> None:
        """One parameter through `load_weights`: how published systems do it; kept for comparison."""
        tensor = torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).view(*shape)
        with torch.no_grad():
            _model_of(self).load_weights(iter([(name, tensor)]))  # type: ignore[operator]

    def advgame_zero(self) -> None:
        """Sets every parameter to zero: a publish must then restore all of them."""
        with torch.no_grad():
            for parameter in _model_of(self).parameters():
                parameter.zero_()


def bind(model: nn.Module, plan: Plan, arena: Tensor, start: int) -> None:
    """Moves the storages of the plan into `arena` from byte `start`; parameters become views, tied ones stay tied."""
    offsets, _ = plan.layout()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for storage in plan.storages:
        flat = flat_view(arena, start + offsets[storage.name], storage.elements, getattr(torch, storage.dtype))
        for name in storage.parameters:
            old = parameters[name].data
            new = torch.as_strided(flat, old.shape, old.stride(), flat.storage_offset() + old.storage_offset())
            if new.data_ptr() != old.data_ptr():
                new.copy_(old)
                parameters[name].data = new


def checksums(model: nn.Module, plan: Plan) -> dict[str, int]:
    """crc32 of every storage, read through the model's own parameters."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {storage.name: checksum(parameters[storage.parameters[0]].data) for storage in plan.storages}


def _model_of(worker: Any) -> nn.Module:
    model: nn.Module = worker.model_runner.get_model()
    return model
