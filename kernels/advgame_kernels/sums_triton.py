"""Checksums over a whole model in one Triton launch, from a table of addresses (segments_triton.py).

Every program adds up one segment of one tensor and adds that to the tensor's place in the output, by one atomic of 64
bits: integers, so that the order does not matter. Four bytes are read as a word where the address allows it, else each
for itself. Speed of light: one read of every byte.
"""

# Triton kernels carry no annotations but constexpr.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from advgame_kernels._launch import device_of
from advgame_kernels.segments_triton import bisections, on_device, row_of

BLOCK = 2048
# A program's share: 32 blocks. A lane's sum of 128 products of a byte and 16 bits just fits 31 bits.
BLOCKS = 32
OPTIONS: dict[str, Any] = {"num_warps": 8}


@triton.jit
def _weights(places):
    """Half of the weights' even part; -1640531535 is 2654435761 in 32 bits with a sign."""
    return ((places * -1640531535) >> 16) & 0xFFFF


@triton.jit
def sums_kernel(
    table,  # (tensors, 4) int64: address; bytes; first segment; place in `out`
    out,  # (n,) int64, zeros before
    tensors,
    WORDS: tl.constexpr,
    BISECTIONS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[tensor] += Σ byte · (2 · weight + 1) over one segment."""
    segment = tl.program_id(0).to(tl.int64)
    row = row_of(table, segment, tensors, 4, 2, BISECTIONS)
    address = tl.load(row)
    size = tl.load(row + 1)
    own = segment - tl.load(row + 2)
    data = address.to(tl.pointer_type(tl.uint8))
    weighted = tl.zeros([BLOCK], dtype=tl.int32)
    plain = tl.zeros([BLOCK], dtype=tl.int32)
    lanes = tl.arange(0, BLOCK)
    if WORDS:
        words = address.to(tl.pointer_type(tl.int32))
        count = size // 4
        for block in range(BLOCKS):
            offsets = (own * BLOCKS + block) * BLOCK + lanes
            word = tl.load(words + offsets, mask=offsets < count, other=0)
            first = (offsets * 4).to(tl.int32)
            for k in tl.static_range(4):
                byte = (word >> (8 * k)) & 0xFF
                weighted += byte * _weights(first + k)
                plain += byte
        # what is left of the last word is the first program's
        offsets = count * 4 + lanes
        byte = tl.load(data + offsets, mask=offsets < tl.where(own == 0, size, 0), other=0).to(tl.int32)
        rest = byte * (2 * _weights(offsets.to(tl.int32)) + 1)
    else:
        for block in range(BLOCKS):
            offsets = (own * BLOCKS + block) * BLOCK + lanes
            byte = tl.load(data + offsets, mask=offsets < size, other=0).to(tl.int32)
            weighted += byte * _weights(offsets.to(tl.int32))
            plain += byte
        rest = tl.zeros([BLOCK], dtype=tl.int32)
    total = tl.sum(2 * weighted.to(tl.int64) + (plain + rest).to(tl.int64))
    tl.atomic_add(out + tl.load(row + 3), total)


@dataclass(frozen=True)
class Launch:
    """One launch over all tensors: their table on the device, the output, grid and constants."""

    table: Tensor
    out: Tensor
    segments: int
    constants: dict[str, Any]

    def run(self) -> None:
        """Fills `out`. May be captured into a CUDA graph."""
        self.out.zero_()
        if self.segments:
            with device_of(self.table):
                sums_kernel[(self.segments,)](
                    self.table, self.out, self.table.shape[0], **self.constants, BLOCKS=BLOCKS, BLOCK=BLOCK, **OPTIONS
                )


def prepare(tensors: Sequence[Tensor], out: Tensor) -> Launch:
    """The launch for contiguous tensors on the device of `out`, (n,) int64; none may move as long as it is used."""
    sizes = [t.numel() * t.element_size() for t in tensors]
    words = all(t.data_ptr() % 4 == 0 for t in tensors)
    share = BLOCK * BLOCKS * (4 if words else 1)
    rows, segments = [], 0
    for number, (t, size) in enumerate(zip(tensors, sizes, strict=True)):
        if size:
            rows.append((t.data_ptr(), size, segments, number))
            segments += -(-size // share)
    table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)
    constants = {"WORDS": words, "BISECTIONS": bisections(rows)}
    return Launch(on_device(table, out.device), out, segments, constants)
