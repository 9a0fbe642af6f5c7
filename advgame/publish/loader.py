"""The channel for engines that allow nothing else: a shared file in the trainer's layout, read by vLLM's own loader."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from advgame.publish.arena import check_free, checksums, flat_view, path_of
from advgame.publish.plan import ALIGNMENT, Source
from advgame.rollout.channel import NoTurns


class LoaderChannel(NoTurns):
    """The trainer writes a shared file in its own layout; the engine then loads it like a checkpoint.

    Right wherever vLLM can reload a model, at the price of its loader: every parameter is copied, split and processed
    by Python again. There is no plan, so a verified delivery compares what the engine has read, by name, not where it
    went; that shows in the sampler's log-probs (`advgame/run/verify.py`).
    """

    # on the CPU a repacked tied head would keep its old copy through vLLM's reload; plain weights have no copies
    direct = True

    def __init__(self, sources: Sequence[Source], dtype: str):
        self.sources, self.dtype = tuple(sources), dtype
        self.notes: tuple[str, ...] = ()
        self._entries: list[list[Any]] = []
        self._file: int | None = None
        self._size = 0
        self._tensors: dict[str, Tensor] = {}

    @property
    def destinations(self) -> Mapping[str, Tensor]:
        return self._tensors

    def prepare(self) -> dict[str, str]:
        return {}

    async def attach(self, llm: Any) -> None:
        if self._file is not None:
            return  # the file is this side's; a new engine opens it at each delivery
        dtype = getattr(torch, self.dtype)
        end = 0
        entries: list[list[Any]] = []
        for source in self.sources:
            elements = torch.Size(source.shape).numel()
            entries.append([source.name, self.dtype, list(source.shape), end])
            end += -(-elements * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        check_free(end, "loader")
        file, size = os.memfd_create("advgame-loader", os.MFD_CLOEXEC), max(end, 1)
        try:
            whole = file_tensor(path_of(file), size)
        except BaseException:
            os.close(file)
            raise
        self._file, self._size, self._entries = file, size, entries
        self._tensors = {
            name: flat_view(whole, offset, torch.Size(shape).numel(), dtype).view(shape)
            for name, _, shape, offset in entries
        }

    async def deliver(self, llm: Any, *, verify: bool) -> None:
        sums = checksums(self._tensors) if verify else None
        assert self._file is not None, "attach comes first"
        await llm.collective_rpc("advgame_load", args=(path_of(self._file), self._size, self._entries, sums))

    def close(self) -> None:
        self._tensors = {}
        self._entries = []
        if self._file is not None:
            os.close(self._file)
            self._file = None


def file_tensor(path: str, size: int) -> Tensor:
    """A uint8 tensor over a shared file, by torch alone: this way must be there where our extension is not."""
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
