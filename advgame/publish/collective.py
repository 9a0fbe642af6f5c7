"""The channel for engines on other nodes: packed, plan-ordered buckets broadcast by the trainer, NCCL or gloo.

The trainer's average is written straight into the buffer that is sent; receivers copy from each bucket into the
storages that the engine already reads, so decode graphs stay valid.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from advgame.errors import InputError
from advgame.publish import group as groups
from advgame.publish.arena import checksum
from advgame.publish.binding import copy_name
from advgame.publish.buckets import Layout, layout_of
from advgame.publish.channels import record_plans
from advgame.publish.cuda_memory import device_id
from advgame.publish.plan import Plan, Source
from advgame.publish.record import view_of
from advgame.rollout.channel import NoTurns
from advgame.rollout.settings import VllmSettings


class CollectiveChannel(NoTurns):
    """One group a start of the engine: rank 0 is the trainer, the others are the engine's workers."""

    direct = True

    def __init__(self, model: str, sources: Sequence[Source], device: torch.device, settings: VllmSettings):
        self.model, self.sources = model, tuple(sources)
        self.notes: tuple[str, ...] = ()
        self.plans: list[Plan] = []
        self.layout: Layout | None = None
        self._device = device
        self._settings = settings
        self._group: Any = None
        self._buffer: Tensor | None = None
        self._tensors: dict[str, Tensor] = {}
        self._gpus = {device_id(device)} if device.type == "cuda" else set[str]()

    @property
    def destinations(self) -> Mapping[str, Tensor]:
        return self._tensors

    def prepare(self) -> dict[str, str]:
        """Opens the port, so that one that is taken is known before an engine starts."""
        _ = self._store
        return {}

    async def attach(self, llm: Any) -> None:
        """Records the plan in the engine and builds the group. Raises PlanRefused with the reasons."""
        self._leave()
        plans = await record_plans(llm, self.model, self.sources)
        if self._gpus and not self._gpus.isdisjoint(await llm.collective_rpc("advgame_device")):
            raise InputError(
                "rollout.vllm.transport: collective needs trainer and engine on different GPUs (NCCL); set ipc, or "
                "rollout.vllm.devices"
            )
        if self.plans and [p.hash for p in plans] != [p.hash for p in self.plans]:
            raise RuntimeError("the restarted engine lays its weights out differently")
        if self.layout is None:
            self.layout = layout_of(plans, self._settings.bucket_mib << 20)
        self.plans = plans
        await self._meet(llm, self.layout)

    async def _meet(self, llm: Any, layout: Layout) -> None:
        """Builds the group."""
        if self._buffer is None:
            self._buffer = torch.zeros(layout.bounds[-1], dtype=torch.uint8, device=self._device)
            self._tensors = {one.name: one.of(self._buffer).view(one.shape) for one in layout.packed}
        how = self._meeting()
        self._group, _ = await _both(
            groups.off_thread(
                lambda: groups.join(
                    self._store, how["name"], 0, how["size"], device=self._device, host=how["host"],
                    seconds=how["seconds"],
                )
            ),
            llm.collective_rpc("advgame_join", args=(how, layout.to_tree())),
        )  # fmt: skip

    @property
    def _store(self) -> Any:
        return groups.open_store(self._settings.rendezvous_host, self._settings.rendezvous_port)

    def _meeting(self) -> dict[str, Any]:
        """How a worker comes to a group of a sender and all workers, by a name that nobody had before."""
        return {
            "host": self._settings.rendezvous_host,
            "port": self._store.port,
            "name": f"advgame-{secrets.token_hex(4)}",
            "size": 1 + len(self.plans),
            "seconds": self._settings.publish_timeout_s,
            "plans": [plan.hash for plan in self.plans],
        }

    async def deliver(self, llm: Any, *, verify: bool) -> None:
        """Sends every bucket while the workers receive; with `verify` they compare what arrived at each place."""
        seconds = self._settings.publish_timeout_s
        sums = self.checksums() if verify else None
        await _both(
            groups.off_thread(lambda: self._send(seconds)), llm.collective_rpc("advgame_receive", args=(seconds, sums))
        )

    def _send(self, seconds: float) -> None:
        assert self.layout is not None
        assert self._buffer is not None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # this thread's stream knows nothing of the one that wrote
        for begin, end in pairwise(self.layout.bounds):
            groups.broadcast(self._group, self._buffer[begin:end], seconds)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def checksums(self) -> list[dict[str, int]]:
        """Of what each rank's copies should have placed, as `binding.copied_checksums` finds it there."""
        flat = {name: tensor.flatten() for name, tensor in self._tensors.items()}
        return [
            {copy_name(i, c): checksum(view_of(flat[c.source], c.taken)) for i, c in enumerate(plan.copies)}
            for plan in self.plans
        ]

    def close(self) -> None:
        self._leave()
        self._buffer, self._tensors, self.layout, self.plans = None, {}, None, []

    def _leave(self) -> None:
        if self._group is not None:
            groups.leave(self._group)
            self._group = None


async def _both(trainer: Awaitable[Any], engine: Awaitable[Any]) -> tuple[Any, Any]:
    """Both sides of a collective call; the first error ends the wait for the other."""
    tasks = [asyncio.ensure_future(one) for one in (trainer, engine)]
    try:
        one, other = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return one, other
