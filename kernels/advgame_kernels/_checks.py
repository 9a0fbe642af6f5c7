"""Argument checks shared by the public functions: every refusal is a ValueError that names the argument."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def refuse(name: str, expected: str, got: object) -> NoReturn:
    """Raise the library's one kind of refusal."""
    raise ValueError(f"{name}: expected {expected}, got {got}")


def describe(x: object) -> str:
    """`Tensor (3, 4) torch.float32 on cpu`, or the type of anything else."""
    if isinstance(x, Tensor):
        return f"Tensor {tuple(x.shape)} {x.dtype} on {x.device}"
    return f"{type(x).__name__} {x!r}"


def floating(name: str, x: Tensor, ndim: int, device: torch.device | None = None) -> None:
    """Refuse anything but a floating-point tensor of `ndim` dimensions (on `device`, when given)."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATS or x.ndim != ndim:
        refuse(name, f"a floating-point tensor with {ndim} dimension(s)", describe(x))
    if device is not None and x.device != device:
        refuse(name, f"a tensor on {device}", describe(x))


def vector(name: str, x: Tensor, length: int, device: torch.device) -> None:
    """Refuse anything but a floating-point vector of `length` on `device`."""
    floating(name, x, 1, device)
    if x.shape[0] != length:
        refuse(name, f"shape ({length},)", describe(x))


def label_ids(labels: Tensor, rows: int, vocab: int, device: torch.device) -> None:
    """Refuse labels that are not `(rows,)` int64 in `[0, vocab)` on `device`.

    On the CPU values are read. On a GPU a device-side assertion is queued instead: reading them would stop the
    host. Compiled graphs hold the same assertion on either, and it is a RuntimeError then.
    """
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or tuple(labels.shape) != (rows,):
        refuse("labels", f"an int64 tensor of shape ({rows},)", describe(labels))
    if labels.device != device:
        refuse("labels", f"a tensor on {device}", describe(labels))
    if not labels.is_contiguous():
        refuse("labels", "a contiguous tensor", f"stride {labels.stride()}")
    if rows == 0:
        return
    if device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(v) for v in torch.aminmax(labels))
        if low < 0 or high >= vocab:
            refuse("labels", f"ids in [0, {vocab})", f"ids from {low} to {high}")
    elif device.type != "meta":
        inside = ((labels >= 0) & (labels < vocab)).all()
        torch._assert_async(inside, f"labels: expected ids in [0, {vocab})")


def positive(name: str, value: float) -> None:
    """Refuse what is not a finite number above zero."""
    if not isinstance(value, Real) or not 0.0 < value < float("inf"):
        refuse(name, "a finite number above 0", describe(value))


def non_negative(name: str, value: float) -> None:
    """Refuse what is not a finite number of at least zero."""
    if not isinstance(value, Real) or not 0.0 <= value < float("inf"):
        refuse(name, "a finite number of at least 0", describe(value))


def finite(name: str, value: float) -> None:
    """Refuse what is not a finite number."""
    if not isinstance(value, Real) or not -float("inf") < value < float("inf"):
        refuse(name, "a finite number", describe(value))


def one_of(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a string that is not among `choices`."""
    if value not in choices:
        refuse(name, "one of " + ", ".join(choices), repr(value))


def host_bounds(
    cu_seqlens: Sequence[int] | Tensor,  # (2P + 1,)
    rows: int,
) -> list[int]:
    """The sequence bounds as a list of ints: 0 first, never falling, `rows` last, an even number of sequences.

    A CUDA tensor is refused: reading it would make the host wait for the GPU in the middle of a step.
    """
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.device.type != "cpu":
            refuse("cu_seqlens", "a list or a CPU tensor (a device tensor costs a host sync)", describe(cu_seqlens))
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            refuse("cu_seqlens", "an int32 or int64 vector", describe(cu_seqlens))
        bounds = cu_seqlens.tolist()
    elif isinstance(cu_seqlens, Iterable) and all(isinstance(b, Integral) for b in cu_seqlens):
        bounds = [int(b) for b in cu_seqlens]
    else:
        refuse("cu_seqlens", "a list of whole numbers or a CPU tensor", describe(cu_seqlens))
    if len(bounds) % 2 == 0:
        refuse("cu_seqlens", "2P + 1 bounds (chosen and rejected of every pair)", f"{len(bounds)} bounds")
    if bounds[0] != 0 or bounds[-1] != rows:
        refuse("cu_seqlens", f"bounds from 0 to {rows} (the rows of hidden)", f"{bounds[0]} to {bounds[-1]}")
    if any(b < a for a, b in pairwise(bounds)):
        refuse("cu_seqlens", "bounds that never fall", "a falling pair of bounds")
    return bounds


def linear_head(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    temperature: float,
    softcap: float,
    shards: int = 1,
) -> None:
    """Checks common to every function that takes hidden states and an LM head (`shards` of it make the vocabulary)."""
    floating("hidden", hidden, 2)
    if hasattr(weight, "full_tensor"):
        refuse("weight", "a plain tensor (call full_tensor() on a DTensor first)", type(weight).__name__)
    if hasattr(weight, "ds_id") and weight.ndim != 2:
        refuse("weight", "a gathered weight (ZeRO-3: use advgame_kernels.patch.gathered_head)", describe(weight))
    floating("weight", weight, 2, hidden.device)
    if weight.shape[1] != hidden.shape[1]:
        refuse("weight", f"shape (V, {hidden.shape[1]})", describe(weight))
    master = weight.dtype == torch.float32 and hidden.dtype.itemsize == 2
    if weight.dtype != hidden.dtype and not master:
        refuse("weight", f"the dtype of hidden, {hidden.dtype}, or float32 beside half precision", describe(weight))
    if weight.shape[0] == 0:
        refuse("weight", "at least one vocabulary row", describe(weight))
    label_ids(labels, hidden.shape[0], shards * weight.shape[0], hidden.device)
    if bias is not None:
        vector("bias", bias, weight.shape[0], hidden.device)
    positive("temperature", temperature)
    non_negative("softcap", softcap)
