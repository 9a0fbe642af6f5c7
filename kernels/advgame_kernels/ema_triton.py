"""The weight average over a whole model in one Triton launch, from a table of addresses (segments_triton.py).

Every program takes one segment of one tensor. Speed of light: 14 bytes a parameter with a float32 player and a bf16
copy. `step` = 1 − decay is read on the device, so a schedule can live there.
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
BLOCKS = 32  # a program's share of a tensor
# Products are rounded before they are added, as plain torch code does it: the same average to the last bit.
OPTIONS: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": False}
# Triton's names of the dtypes that a table's addresses may point to.
TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit(do_not_specialize=["seed"])  # it changes every step
def ema_kernel(
    table,  # (tensors, 6) int64: addresses of shadow, param, publish, compensation; elements; first segment
    step,  # (1,) float32
    seed,  # of the stochastic rounding
    tensors,
    SHADOW: tl.constexpr,
    PARAM: tl.constexpr,
    PUBLISH: tl.constexpr,
    HAS_PUBLISH: tl.constexpr,
    COMPENSATED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BISECTIONS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """shadow += step · (param − shadow) on one segment; the copy is written while the new value is in registers."""
    segment = tl.program_id(0).to(tl.int64)
    row = row_of(table, segment, tensors, 6, 5, BISECTIONS)
    shadow = tl.load(row).to(tl.pointer_type(SHADOW))
    param = tl.load(row + 1).to(tl.pointer_type(PARAM))
    publish = tl.load(row + 2).to(tl.pointer_type(PUBLISH))
    kept = tl.load(row + 3).to(tl.pointer_type(SHADOW))
    if ALIGNED:
        kept = tl.multiple_of(kept, 16)
        shadow = tl.multiple_of(shadow, 16)
        param = tl.multiple_of(param, 16)
        publish = tl.multiple_of(publish, 16)
    numel = tl.load(row + 4)
    start = (segment - tl.load(row + 5)) * (BLOCKS * BLOCK)
    rate = tl.load(step)
    for block in range(BLOCKS):
        offsets = start + block * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < numel
        s = tl.load(shadow + offsets, mask=inside, other=0.0).to(tl.float32)
        if COMPENSATED:
            s += tl.load(kept + offsets, mask=inside, other=0.0).to(tl.float32)
        p = tl.load(param + offsets, mask=inside, other=0.0).to(tl.float32)
        s += rate * (p - s)
        if STOCHASTIC:
            # 16 random bits below the kept ones, then truncation; a counter of its own for every element of the model
            noise = tl.randint(seed, segment * (BLOCKS * BLOCK) + block * BLOCK + tl.arange(0, BLOCK)) & 0xFFFF
            bits = (s.to(tl.int32, bitcast=True) + noise.to(tl.int32, bitcast=True)) & -65536
            s = tl.where(tl.abs(s) < float("inf"), bits.to(tl.float32, bitcast=True), s)
        stored = s.to(SHADOW)
        tl.store(shadow + offsets, stored, mask=inside)
        if COMPENSATED:
            tl.store(kept + offsets, (s - stored.to(tl.float32)).to(SHADOW), mask=inside)
        if HAS_PUBLISH:
            tl.store(publish + offsets, stored.to(PUBLISH), mask=inside)


@dataclass(frozen=True)
class Launch:
    """One launch of the kernel over tensors of the same dtypes: its table on the device, grid and constants."""

    table: Tensor
    segments: int
    device: torch.device
    constants: dict[str, Any]

    def run(self, step: Tensor, seed: int = 0) -> None:
        """step: (1,) float32 on the device, read by the kernel. May be captured into a CUDA graph."""
        if self.segments:
            with device_of(self.table):
                ema_kernel[(self.segments,)](
                    self.table, step, seed, self.table.shape[0], **self.constants, BLOCKS=BLOCKS, BLOCK=BLOCK,
                    **OPTIONS,
                )  # fmt: skip


def prepare(
    shadow: Sequence[Tensor],
    params: Sequence[Tensor],
    publish: Sequence[Tensor],
    compensation: Sequence[Tensor] = (),
    *,
    stochastic: bool = False,
) -> Launch:
    """The launch for tensors of one dtype each; no tensor may move as long as it is used."""
    table, segments = _table(shadow, params, publish, compensation)
    aligned = bool((table[:, :4] % 16 == 0).all())
    device = shadow[0].device
    constants = {
        "SHADOW": TRITON_TYPES[shadow[0].dtype], "PARAM": TRITON_TYPES[params[0].dtype],
        "PUBLISH": TRITON_TYPES[publish[0].dtype if publish else torch.float32], "HAS_PUBLISH": bool(publish),
        "COMPENSATED": bool(compensation), "STOCHASTIC": stochastic, "ALIGNED": aligned,
        "BISECTIONS": bisections(table),
    }  # fmt: skip
    return Launch(on_device(table, device), segments, device, constants)


@torch.library.custom_op("advgame_kernels::ema_update_", mutates_args=("shadow", "publish", "compensation"))
def _ema_update_(
    shadow: list[Tensor],
    params: list[Tensor],
    publish: list[Tensor],
    compensation: list[Tensor],
    step: Tensor,
    seed: int,
    stochastic: bool,
) -> None:
    prepare(shadow, params, publish, compensation, stochastic=stochastic).run(step, seed)


@_ema_update_.register_fake
def _(*args: object, **kwargs: object) -> None:
    return None


def _table(
    shadow: Sequence[Tensor], params: Sequence[Tensor], publish: Sequence[Tensor], compensation: Sequence[Tensor]
) -> tuple[Tensor, int]:
    """The kernel's table on the host and the number of programs; tensors without elements are left out."""
    rows, segments = [], 0
    for i, (s, p) in enumerate(zip(shadow, params, strict=True)):
        if s.numel():
            optional = (x[i].data_ptr() if x else 0 for x in (publish, compensation))
            rows.append((s.data_ptr(), p.data_ptr(), *optional, s.numel(), segments))
            segments += triton.cdiv(s.numel(), BLOCK * BLOCKS)
    return torch.tensor(rows, dtype=torch.int64).view(-1, 6), segments


def ema_update_(
    shadow: Sequence[Tensor],  # float32, contiguous, one device
    params: Sequence[Tensor],  # float32, bfloat16 or float16
    step: Tensor,  # (1,) float32 on the device: 1 − decay
    publish: Sequence[Tensor | None] | None,
    compensation: Sequence[Tensor] | None,
    seed: int | None,
) -> None:
    """One launch for each pair of (parameter, published) dtypes that occurs: one, as a rule."""
    for launch, members in enumerate(groups(params, publish)):
        copies = copies_of(publish, members)
        kept = [] if compensation is None else [compensation[i] for i in members]
        noise = 0 if seed is None else (seed * 31 + launch) % (1 << 31)
        players = [params[i].detach() for i in members]
        _ema_update_([shadow[i] for i in members], players, copies, kept, step, noise, seed is not None)


def groups(params: Sequence[Tensor], publish: Sequence[Tensor | None] | None) -> list[list[int]]:
    """Indices of tensors that one launch may take together: by dtype of player and published copy."""
    found: dict[tuple[torch.dtype, torch.dtype | None], list[int]] = {}
    for i, p in enumerate(params):
        out = None if publish is None else publish[i]
        found.setdefault((p.dtype, None if out is None else out.dtype), []).append(i)
    return list(found.values())


def copies_of(publish: Sequence[Tensor | None] | None, members: Sequence[int]) -> list[Tensor]:
    """The published copies of one group: all of them or none."""
    return [] if publish is None else [out for i in members if (out := publish[i]) is not None]
