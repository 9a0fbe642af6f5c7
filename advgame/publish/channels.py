"""Channels of weights into a vLLM engine: shared memory written in place, or vLLM's own loader as the fall-back."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from advgame.publish.arena import Arena, checksum, flat_view
from advgame.publish.destinations import Destinations
from advgame.publish.plan import ALIGNMENT, Plan, Source, source_problems
from advgame.publish.record import PlanRefused


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


class ShmChannel:
    """The engine's parameters live in memory of the trainer, which writes them where the engine reads."""

    direct = True

    def __init__(self, model: str, sources: Sequence[Source]):
        self.model, self.sources = model, tuple(sources)
        self.plans: list[Plan] = []
        self.notes: tuple[str, ...] = ()
        self._arena: Arena | None = None
        self._starts: list[int] = []
        self._made: Destinations | None = None

    @property
    def destinations(self) -> Mapping[str, Tensor]:
        assert self._made is not None, "attach comes first"
        return self._made.tensors

    @property
    def staged(self) -> tuple[str, ...]:
        """Names that need a second copy."""
        assert self._made is not None, "attach comes first"
        return self._made.staged

    async def attach(self, llm: Any) -> None:
        """Records the plan in the engine, lets its weights move into a new arena, and maps the destinations.

        Raises PlanRefused with the reasons, and RuntimeError if a restarted engine has another plan.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        self.close()
        plans = await record_plans(llm, self.model, self.sources)
        if self.plans and [p.hash for p in plans] != [p.hash for p in self.plans]:
            raise RuntimeError("the restarted engine lays its weights out differently")
        sizes = [plan.layout()[1] for plan in plans]
        starts = [sum(sizes[:rank]) for rank in range(len(sizes))]
        arena = Arena(sum(sizes))
        info = {"path": arena.path, "size": arena.size, "offsets": starts, "hashes": [p.hash for p in plans]}
        try:
            await llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))
        finally:
            arena.close()  # everyone who needs it has mapped it
        self.plans, self._arena, self._starts = plans, arena, starts
        self._made = Destinations(plans, arena.bytes, starts)

    async def deliver(self, llm: Any, *, verify: bool) -> None:
        """Places what was staged; with `verify` the engine compares checksums and raises on a difference."""
        assert self._made is not None
        self._made.scatter()
        if not verify:
            return
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await llm.start_weight_update()
        await llm.update_weights(WeightTransferUpdateRequest(update_info={"checksums": self.checksums()}))
        await llm.finish_weight_update()

    def checksums(self) -> list[dict[str, int]]:
        """crc32 of every storage as the trainer sees it, by rank."""
        assert self._arena is not None
        found = []
        for plan, start in zip(self.plans, self._starts, strict=True):
            offsets, _ = plan.layout()
            whole = {
                s.name: flat_view(self._arena.bytes, start + offsets[s.name], s.bytes, torch.uint8)
                for s in plan.storages
            }
            found.append({name: checksum(data) for name, data in whole.items()})
        return found

    def close(self) -> None:
        """Drops this side's mapping; the memory goes with the engine's."""
        self._made = None
        if self._arena is not None:
            self._arena.close()
            self._arena = None


class LoaderChannel:
    """The trainer writes a shared file in its own layout; the engine then loads it like a checkpoint.

    Right wherever vLLM can reload a model, at the price of its loader: every parameter is copied, split and processed
    by Python again.
    """

    # on the CPU a repacked tied head would keep its old copy through vLLM's reload; plain weights have no copies
    direct = True

    def __init__(self, sources: Sequence[Source], dtype: str):
        self.sources, self.dtype = tuple(sources), dtype
        self.notes: tuple[str, ...] = ()
        self._entries: list[list[Any]] = []
        self._arena: Arena | None = None
        self._tensors: dict[str, Tensor] = {}

    @property
    def destinations(self) -> Mapping[str, Tensor]:
        return self._tensors

    async def attach(self, llm: Any) -> None:
        if self._arena is not None:
            return  # the file is this side's; a new engine opens it at each delivery
        dtype = getattr(torch, self.dtype)
        end = 0
        for source in self.sources:
            elements = torch.Size(source.shape).numel()
            self._entries.append([source.name, self.dtype, list(source.shape), end])
            end += -(-elements * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self._arena = Arena(end)
        self._tensors = {
            name: flat_view(self._arena.bytes, offset, torch.Size(shape).numel(), dtype).view(shape)
            for name, _, shape, offset in self._entries
        }

    async def deliver(self, llm: Any, *, verify: bool) -> None:
        assert self._arena is not None
        await llm.collective_rpc("advgame_load", args=(self._arena.path, self._arena.size, self._entries))

    def close(self) -> None:
        self._tensors = {}
        self._entries = []
        if self._arena is not None:
            self._arena.close()
            self._arena = None


class AutoChannel:
    """Shared memory where the plan allows it, else the loader; `notes` says why."""

    direct = True

    def __init__(self, model: str, sources: Sequence[Source], dtype: str):
        self._shm, self._loader = ShmChannel(model, sources), LoaderChannel(sources, dtype)
        self.used: ShmChannel | LoaderChannel = self._shm
        self.notes: tuple[str, ...] = ()

    @property
    def destinations(self) -> Mapping[str, Tensor]:
        return self.used.destinations

    async def attach(self, llm: Any) -> None:
        if self.used is self._shm:
            try:
                return await self._shm.attach(llm)
            except PlanRefused as refusal:
                self.notes = (f"weights go through vLLM's loader, which is slower: {'; '.join(refusal.reasons[:3])}",)
                self.used = self._loader
        return await self._loader.attach(llm)

    async def deliver(self, llm: Any, *, verify: bool) -> None:
        await self.used.deliver(llm, verify=verify)

    def close(self) -> None:
        self._shm.close()
        self._loader.close()


async def guard(llm: Any) -> None:
    """Lets the engine's processes ignore Ctrl-C and die with this one."""
    await llm.collective_rpc("advgame_guard", args=(os.getpid(),))
