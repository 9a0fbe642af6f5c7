"""GPU memory of the trainer in which an engine's parameters live: one plain allocation a rank, shared by CUDA IPC.

The memory comes from cudaMalloc itself and not from torch's allocator, so that whatever that one is told (expandable
segments, for example, which cannot be exported) does not matter here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from advgame.errors import InputError
from advgame.publish import host
from advgame.publish.plan import Plan


def device_id(device: torch.device) -> str:
    """The same for the same GPU in every process, whatever CUDA_VISIBLE_DEVICES says."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"


def present() -> list[str]:
    """The names of the GPUs that this process sees."""
    return [device_id(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]


def local_device(wanted: str, here: Sequence[str]) -> int:
    """Index here of the GPU that an engine calls `wanted`. InputError if this process does not see it."""
    if wanted not in here:
        raise InputError(
            f"{host.FIELD}: ipc needs the engine's GPU {wanted} visible to the trainer too; widen CUDA_VISIBLE_DEVICES "
            "of the trainer, or set collective"
        )
    return here.index(wanted)


class CudaMemory:
    """Allocations by rank. They outlive an engine: a restarted one opens the same memory."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self._held: list[tuple[Any, int]] = []

    def grant(self, plans: Sequence[Plan], devices: Sequence[str]) -> list[dict[str, Any]]:
        """Memory on each rank's own GPU, as plain data for `open_shared`. InputError: no such GPU, or not enough."""
        here = present()
        places = [local_device(wanted, here) for wanted in devices]
        sizes = [max(1, plan.layout()[1]) for plan in plans]
        if [(memory.device, size) for memory, size in self._held] != list(zip(places, sizes, strict=True)):
            self.close()
            torch.cuda.empty_cache()  # what torch keeps for itself is not free for us
            self._held = [(allocated(place, size), size) for place, size in zip(places, sizes, strict=True)]
            self.parts = [tensor_over(memory).zero_() for memory, _ in self._held]
            for place in set(places):
                torch.cuda.synchronize(place)
        return [{"kind": "cuda", "handle": memory.handle.hex(), "size": size} for memory, size in self._held]

    def settled(self) -> None:
        """Every rank has opened its part; nothing to take back."""

    def close(self) -> None:
        self.parts, self._held = [], []


def allocated(device: int, size: int) -> Any:
    """`size` bytes of a GPU, ours until nobody refers to them. InputError: there are not so many."""
    try:
        return host.cuda().allocate(device, size)
    except RuntimeError as error:
        raise InputError(
            f"{host.FIELD}: ipc gets no {size / 2**30:.2f} GiB on GPU {device} ({error}); lower "
            "rollout.vllm.memory_share, or use collective"
        ) from error


def open_shared(memory: Mapping[str, Any], device: torch.device) -> Tensor:
    """The memory of a grant in the engine's process; `device` is the same GPU under the engine's own number.

    RuntimeError: the CUDA runtime's reason; InputError: there is no runtime.
    """
    index = device.index if device.index is not None else torch.cuda.current_device()
    return tensor_over(host.cuda().open(index, bytes.fromhex(memory["handle"]), memory["size"]))


def tensor_over(memory: Any) -> Tensor:
    """A uint8 tensor over device memory of ours, which it keeps. RuntimeError: torch would have made a copy."""
    made = torch.as_tensor(memory, device=torch.device("cuda", memory.device))
    if made.data_ptr() != memory.__cuda_array_interface__["data"][0]:
        raise RuntimeError(f"torch copies memory of GPU {memory.device} instead of using it")
    return made
