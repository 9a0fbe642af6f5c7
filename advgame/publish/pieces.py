"""What each rank of a sharded trainer sends of its own, and how a worker puts the pieces together.

A piece is a run of a flattened parameter's elements. Messages follow the buckets of the plan; within a bucket every
sender has messages of its own, and who holds nothing of it has none. A worker collects the pieces of a bucket at their
places in a staging buffer, from which the same copies are made as from a bucket that came whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import groupby, pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from advgame.publish import group as groups
from advgame.publish.arena import checksum, flat_view
from advgame.publish.binding import compare, copied_checksums
from advgame.publish.buckets import Layout, Unpacker
from advgame.publish.plan import ITEM_BYTES

Span = tuple[int, int]
"""First element and number of elements."""

ALIGNMENT = 16
"""Bytes that every run in a message starts on a multiple of."""


@dataclass(frozen=True)
class Run:
    """Elements [start, start + length) of a flattened source, from byte `at` of a message."""

    source: str
    start: int
    length: int
    at: int

    @property
    def name(self) -> str:
        return f"{self.source}[{self.start}:{self.start + self.length}]"


@dataclass(frozen=True)
class Message:
    """What one sender broadcasts at once: runs of the sources of one bucket, `bytes` together."""

    bucket: int
    sender: int
    runs: tuple[Run, ...]
    bytes: int


def messages_of(layout: Layout, held: Sequence[Mapping[str, Span]], limit: int) -> tuple[Message, ...]:
    """Every message of a publish, in the order in which workers receive them.

    held: by sender, each source's span there. limit: most bytes of a message. ValueError: the spans leave elements of a
    source out, or give them twice.
    """
    for one in layout.packed:
        cuts = sorted(spans[one.name] for spans in held if spans[one.name][1])
        if [0, *(start + n for start, n in cuts)] != [*(start for start, _ in cuts), prod(one.shape)]:
            raise ValueError(f"the ranks' shards are not all of {one.name} once: {cuts}")
    made = []
    for bucket, (begin, end) in enumerate(pairwise(layout.bounds)):
        inside = [one for one in layout.packed if begin <= one.offset < end]
        for sender, spans in enumerate(held):
            runs: list[Run] = []
            size = 0
            for one in inside:
                start, left = spans[one.name]
                while left:
                    at = -(-size // ALIGNMENT) * ALIGNMENT
                    length = min(left, (limit - at) // ITEM_BYTES[one.dtype])
                    if length <= 0:
                        made.append(Message(bucket, sender, tuple(runs), size))
                        runs, size = [], 0
                        continue
                    runs.append(Run(one.name, start, length, at))
                    size = at + length * ITEM_BYTES[one.dtype]
                    start, left = start + length, left - length
            if runs:
                made.append(Message(bucket, sender, tuple(runs), size))
    return tuple(made)


def digest(messages: Sequence[Message]) -> str:
    """Hex; equal where both sides cut alike."""
    text = json.dumps([astuple(message) for message in messages])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class PieceSender:
    """One rank's messages to the workers of one engine, in a group of which it is rank 0.

    spans: what the rank holds of every source. The buffer holds one message, on `device`. called_off: asked while it
    waits for workers.
    """

    def __init__(
        self,
        layout: Layout,
        messages: Sequence[Message],
        spans: Mapping[str, Span],
        group: Any,
        device: torch.device,
        called_off: Callable[[], bool],
    ):
        self.group, self._called_off = group, called_off
        self._dtypes = {one.name: getattr(torch, one.dtype) for one in layout.packed}
        self._messages, self._spans, self._device = tuple(messages), spans, device
        self._buffer = torch.empty(max((m.bytes for m in messages), default=0), dtype=torch.uint8, device=device)

    @torch.no_grad()
    def send(self, pieces: Mapping[str, Tensor], seconds: float, *, verify: bool) -> dict[str, int]:
        """Converts and broadcasts this rank's `pieces` (1-D); each message is waited for `seconds` at most.

        Returns, with `verify`, a checksum of every run that was sent. RuntimeError: the workers are gone, or silent,
        or it is called off.
        """
        sums = {}
        for message in self._messages:
            for run in message.runs:
                into = flat_view(self._buffer, run.at, run.length, self._dtypes[run.source])
                into.copy_(pieces[run.source].narrow(0, run.start - self._spans[run.source][0], run.length))
                if verify:
                    sums[run.name] = checksum(into)
            groups.broadcast(self.group, self._buffer[: message.bytes], seconds, self._called_off)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return sums


class PieceReceiver:
    """A worker's part: messages of all senders, each in a group of its own (rank 0 is the sender)."""

    def __init__(self, unpacker: Unpacker, messages: Sequence[Message], members: Sequence[Any]):
        self._unpacker, self._groups = unpacker, members
        self._buckets = [tuple(own) for _, own in groupby(messages, key=lambda message: message.bucket)]
        most = max((m.bytes for m in messages if len(m.runs) > 1), default=0)
        self._buffer = torch.empty(most, dtype=torch.uint8, device=unpacker.buffer.device)
        self._packed = {one.name: one for one in unpacker.layout.packed}

    @torch.no_grad()
    def receive(self, seconds: float, *, verify: bool) -> dict[str, int]:
        """Receives every bucket and makes its copies; each message is waited for `seconds` at most.

        With `verify` every place is compared with the staging buffer that it was copied from (RuntimeError names the
        first that differs), and the checksums of all runs in that buffer are returned, for the senders' to be compared.
        """
        sums, placed = dict[str, int](), dict[str, int]()
        unpacker = self._unpacker
        for number, messages in enumerate(self._buckets):
            for message in messages:
                whole = len(message.runs) == 1
                data = self._staged(number, message.runs[0]) if whole else self._buffer[: message.bytes]
                groups.broadcast(self._groups[message.sender], data, seconds)
                for run in message.runs:
                    into = self._staged(number, run)
                    if not whole:
                        into.copy_(data[run.at : run.at + into.numel()])
                    if verify:
                        sums[run.name] = checksum(into)
            if verify:
                placed |= unpacker.taken_checksums(number)
            unpacker.unpack(number)
        if self._buffer.device.type == "cuda":
            torch.cuda.synchronize(self._buffer.device)
        if verify:
            compare(placed, copied_checksums(unpacker.plan, unpacker.flats))
        return sums

    def _staged(self, bucket: int, run: Run) -> Tensor:
        """The bytes of a run in the staging buffer."""
        packed = self._packed[run.source]
        item = ITEM_BYTES[packed.dtype]
        first = packed.offset - self._unpacker.layout.bounds[bucket] + run.start * item
        return self._unpacker.buffer[first : first + run.length * item]
