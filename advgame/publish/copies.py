"""Copies that follow a write, such as the slices of a tensor-parallel engine, made into one call once.

On the CPU our own threads run them; on a GPU they are the nodes of one CUDA graph, also those to another GPU. What is
no copy of rows of bytes (it converts, or its elements lie apart) and what a GPU cannot reach is left to torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from advgame.publish import host

Fingerprint = tuple[object, ...]


def fingerprint(tensors: Iterable[Tensor], key: str = "") -> Fingerprint:
    """Equal for the same memory, read in the same way, under the same plan (`key`)."""
    return (key, *((t.data_ptr(), tuple(t.shape), t.stride(), t.dtype, t.device) for t in tensors))


class Copies:
    """`into.copy_(taken)` for every pair, all of one trainer's device. rest: the pairs that torch copies."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]):
        self.pairs = tuple(pairs)
        self.device = pairs[0][1].device if pairs else torch.device("cpu")
        self.rest = self.pairs
        self.rows: Any = None
        self._graph: Any = None
        if pairs and not host.missing():
            alike = [pair for pair in self.pairs if self._taken(*pair)]
            self.rows = host.require("shm").Copies([_entry(*pair) for pair in alike])
            left = {id(alike[i]) for i in self.rows.left}
            ours = {id(pair) for pair in alike} - left
            self.rest = tuple(pair for pair in self.pairs if id(pair) not in ours)

    def __len__(self) -> int:
        return len(self.pairs)

    def _taken(self, into: Tensor, taken: Tensor) -> bool:
        if into.dtype != taken.dtype or taken.device != self.device or into.device.type != taken.device.type:
            return False
        return into.device == taken.device or bool(host.cuda().reaches(taken.device.index, into.device.index))

    def __call__(self) -> None:
        """Makes all copies: on the CPU they are there when this returns, on a GPU they follow its current stream."""
        if self.rows is not None:
            if self.device.type == "cuda":
                self._launch()
            else:
                self.rows.run(torch.get_num_threads())
        for into, taken in self.rest:
            into.copy_(taken)

    def _launch(self) -> None:
        if self._graph is None:
            self._graph = host.require("ipc").PublishGraph(host.cuda(), self.device.index)
            self._graph.then_copies(self.rows)
        self._graph.launch(torch.cuda.current_stream(self.device).cuda_stream)


def _entry(into: Tensor, taken: Tensor) -> tuple[Any, ...]:
    """A copy as the extension takes it."""
    if into.shape != taken.shape:
        raise ValueError(f"a copy of {tuple(taken.shape)} into {tuple(into.shape)}")
    return (into.data_ptr(), taken.data_ptr(), into.element_size(), list(into.shape), into.stride(), taken.stride())
