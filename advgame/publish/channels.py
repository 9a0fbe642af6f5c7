"""Channels of weights into a vLLM engine whose parameters live in memory of the trainer, and the choice with fall-back.

The memory is a POSIX shared mapping for engines on the CPU and a CUDA allocation, opened over IPC, for engines on a GPU
of the same node. Everything else is the same: the meeting at the start, the plan, the write, the checksums.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from advgame.publish import host
from advgame.publish.arena import SharedMemory
from advgame.publish.cuda_memory import CudaMemory
from advgame.publish.destinations import Destinations
from advgame.publish.loader import LoaderChannel
from advgame.publish.meeting import Meeting
from advgame.publish.plan import Plan, Source, source_problems
from advgame.publish.record import PlanRefused
from advgame.rollout.channel import NoTurns


async def record_plans(llm: Any, model: str, sources: Sequence[Source]) -> list[Plan]:
    """The plan of every rank of a running engine. Raises PlanRefused with the ranks' reasons."""
    wanted = [[source.name, list(source.shape)] for source in sources]
    answers = await llm.collective_rpc("advgame_plan", args=(model, wanted))
    reasons = dict.fromkeys(reason for answer in answers for reason in answer.get("refused", ()))
    if reasons:
        raise PlanRefused(list(reasons))
    plans = [Plan.from_tree(answer["plan"]) for answer in answers]
    if found := source_problems(plans):
        raise PlanRefused(found)
    return plans


class Memory(Protocol):
    """The trainer's memory for an engine's parameters."""

    parts: list[Tensor]

    def grant(self, plans: Sequence[Plan], devices: Sequence[str]) -> list[dict[str, Any]]: ...

    def settled(self) -> None: ...

    def close(self) -> None: ...


class ArenaChannel(NoTurns):
    """The engine's parameters live in memory of the trainer, which writes them where the engine reads."""

    direct = True

    def __init__(self, model: str, sources: Sequence[Source], memory: Memory, device: torch.device | None = None):
        self.model, self.sources = model, tuple(sources)
        self.plans: list[Plan] = []
        self.notes: tuple[str, ...] = ()
        self._memory = memory
        self._device = device
        self._meeting: Meeting | None = None
        self._made: Destinations | None = None

    @property
    def destinations(self) -> Destinations:
        assert self._made is not None, "attach comes first"
        return self._made

    @property
    def staged(self) -> tuple[str, ...]:
        """Names that need a second copy."""
        return self.destinations.staged

    def prepare(self) -> dict[str, str]:
        """Opens the meeting of the coming start; returns what the engine finds it by."""
        self._leave()
        self._made = None  # a restart's memory comes in the place of this
        self._meeting = Meeting(self.model, self.sources, self._memory.grant)
        return self._meeting.environment

    async def attach(self, llm: Any) -> None:
        """Takes the outcome of the meeting: the engine's weights moved into the memory when it started.

        Raises PlanRefused with the reasons, InputError where there is no memory, and RuntimeError if a restarted engine
        has another plan.
        """
        assert self._meeting is not None, "prepare comes first"
        try:
            plans = self._meeting.outcome()
        except PlanRefused:
            if len(self._memory.parts) == 1:  # of several ranks one may live there already
                self._memory.close()
            raise
        finally:
            self._leave()
        if self.plans and [p.hash for p in plans] != [p.hash for p in self.plans]:
            raise RuntimeError("the restarted engine lays its weights out differently")
        self._memory.settled()
        self.plans = plans
        self._made = Destinations(plans, self._memory.parts, self._device)

    def expect(self, *, verify: bool) -> None:
        self.destinations.verify, self.destinations.summed = verify, False

    async def deliver(self, llm: Any, *, verify: bool) -> None:
        """Places what was staged, fences; with `verify` the engine compares plan and checksums, and raises."""
        self.destinations.settle()
        if self._memory.parts[0].device.type == "cuda":
            for part in self._memory.parts:
                torch.cuda.synchronize(part.device)
            if self._device is not None:
                torch.cuda.synchronize(self._device)
        if verify:
            if wrong := self.destinations.astray():
                raise RuntimeError(f"what was staged is not where the engine reads it: {', '.join(wrong[:3])}")
            await llm.collective_rpc("advgame_verify", args=([plan.hash for plan in self.plans], self.checksums()))

    def checksums(self) -> list[dict[str, int]]:
        """Of every storage as the trainer sees it, by rank."""
        return self.destinations.checksums()

    def close(self) -> None:
        """Drops this side's memory; shared mappings go with the engine's, CUDA memory is the trainer's own."""
        self._leave()
        self._made = None
        self._memory.close()

    def _leave(self) -> None:
        if self._meeting is not None:
            self._meeting.close()
            self._meeting = None


class ShmChannel(ArenaChannel):
    """POSIX shared memory: engines on the CPU."""

    def __init__(self, model: str, sources: Sequence[Source]):
        super().__init__(model, sources, SharedMemory())

    def prepare(self) -> dict[str, str]:
        """InputError: our extension was not built."""
        host.require("shm")
        return super().prepare()


class IpcChannel(ArenaChannel):
    """CUDA IPC: engines on GPUs of this node. device: where the trainer's averages live."""

    def __init__(self, model: str, sources: Sequence[Source], device: torch.device):
        super().__init__(model, sources, CudaMemory(), device)

    def prepare(self) -> dict[str, str]:
        """InputError: our extension was not built, or finds no CUDA runtime."""
        host.cuda()
        return super().prepare()


class AutoChannel(NoTurns):
    """Direct writes where the plan allows them and our extension is there, else the loader; `notes` says why."""

    direct = True

    def __init__(self, model: str, sources: Sequence[Source], dtype: str, arena: ArenaChannel | None = None):
        self._arena = arena or ShmChannel(model, sources)
        self._loader = LoaderChannel(sources, dtype)
        self.used: ArenaChannel | LoaderChannel = self._arena
        self.notes: tuple[str, ...] = ()
        if reason := host.missing():
            self._through_the_loader([reason])

    @property
    def destinations(self) -> Mapping[str, Tensor]:
        return self.used.destinations

    def prepare(self) -> dict[str, str]:
        return self.used.prepare()

    async def attach(self, llm: Any) -> None:
        if self.used is self._arena:
            try:
                return await self._arena.attach(llm)
            except PlanRefused as refusal:
                self._through_the_loader(refusal.reasons)
        return await self._loader.attach(llm)

    def _through_the_loader(self, reasons: Sequence[str]) -> None:
        self.notes = (f"weights go through vLLM's loader, which is slower: {'; '.join(reasons[:3])}",)
        self.used = self._loader

    def expect(self, *, verify: bool) -> None:
        self.used.expect(verify=verify)

    async def deliver(self, llm: Any, *, verify: bool) -> None:
        await self.used.deliver(llm, verify=verify)

    def close(self) -> None:
        self._arena.close()
        self._loader.close()


async def guard(llm: Any) -> None:
    """Lets the engine's processes ignore Ctrl-C and die with this one."""
    await llm.collective_rpc("advgame_guard", args=(os.getpid(),))
