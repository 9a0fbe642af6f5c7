"""GPU memory of the trainer in which an engine's parameters live: one plain allocation a rank, shared by CUDA IPC.

Written without a GPU at hand: what decides (which device, what is refused) is plain Python with tests, the rest is four
calls of torch's own tensor sharing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from advgame.errors import InputError
from advgame.publish.plan import Plan

FIELD = "rollout.vllm.transport"
_BYTES = (7, 11, 13)
_DEVICE = 6
"""Places of handle, counter handle and event handle, and of the device, in torch's arguments of a shared tensor."""


def refuse_expandable(environment: Mapping[str, str] = os.environ) -> None:
    """InputError if torch's allocator makes segments that CUDA IPC cannot export."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if re.search(r"expandable_segments\s*:\s*true", environment.get(name, ""), re.IGNORECASE):
            raise InputError(
                f"{FIELD}: ipc cannot share memory of expandable segments; take expandable_segments:True out of {name}"
            )


def device_id(device: torch.device) -> str:
    """The same for the same GPU in every process, whatever CUDA_VISIBLE_DEVICES says."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"


def local_device(wanted: str, present: Sequence[str]) -> int:
    """Index here of the GPU that an engine calls `wanted`. InputError if this process does not see it."""
    if wanted not in present:
        raise InputError(
            f"{FIELD}: ipc needs the engine's GPU {wanted} visible to the trainer too; widen CUDA_VISIBLE_DEVICES of "
            "the trainer, or set collective"
        )
    return present.index(wanted)


class CudaMemory:
    """Allocations by rank. They outlive an engine: a restarted one opens the same memory."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def grant(self, plans: Sequence[Plan], devices: Sequence[str]) -> list[dict[str, Any]]:
        """Memory on each rank's own GPU, as plain data for `open_part`. Raises InputError: no such GPU, not enough."""
        refuse_expandable()
        present = [device_id(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
        places = [torch.device("cuda", local_device(wanted, present)) for wanted in devices]
        sizes = [plan.layout()[1] for plan in plans]
        if [(p.device, p.numel()) for p in self.parts] != list(zip(places, sizes, strict=True)):
            self.parts = []
            for place, size in zip(places, sizes, strict=True):
                free, _ = torch.cuda.mem_get_info(place)
                if size > free:
                    raise InputError(
                        f"{FIELD}: ipc needs {size / 2**30:.2f} GiB on {place}, {free / 2**30:.2f} GiB are free; lower "
                        "rollout.vllm.memory_share, or use collective"
                    )
                self.parts.append(torch.zeros(size, dtype=torch.uint8, device=place))
        torch.cuda.synchronize()
        return [shared(part) for part in self.parts]

    def settled(self) -> None:
        """Every rank has opened its part; nothing to take back."""

    def close(self) -> None:
        self.parts = []


def shared(part: Tensor) -> dict[str, Any]:
    """Plain data from which another process opens the memory of a uint8 CUDA tensor."""
    _, arguments = reductions.reduce_tensor(part)
    plain = list(arguments)
    plain[4], plain[5] = None, None  # storage class and dtype: bytes
    for i in _BYTES:
        plain[i] = None if plain[i] is None else plain[i].hex()
    return {"kind": "cuda", "arguments": [None, list(plain[1]), list(plain[2]), *plain[3:]]}


def open_shared(memory: Mapping[str, Any], device: torch.device) -> Tensor:
    """The tensor, in the engine's process; `device` is the same GPU under the engine's own number."""
    arguments = list(memory["arguments"])
    for i in _BYTES:
        arguments[i] = None if arguments[i] is None else bytes.fromhex(arguments[i])
    arguments[0], arguments[4], arguments[5] = torch.Tensor, torch.UntypedStorage, torch.uint8
    arguments[_DEVICE] = device.index if device.index is not None else torch.cuda.current_device()
    opened: Tensor = reductions.rebuild_cuda_tensor(*arguments)
    return opened
