"""MKL's product of bfloat16 matrices with float32 results, out of the library that CPU torch brings along.

torch's own CPU products round their results to bfloat16. Intel's library, linked into the x86 wheels, also has
`cblas_gemm_bf16bf16f32`: bfloat16 operands, float32 sums and results, and `C := A·B + beta·C`. It is found by name;
where it is missing (other processors, other builds of torch) or would only be emulated, callers convert to float32.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROW_MAJOR, AS_IS, TRANSPOSED = 101, 111, 112
LARGEST = 2**31 - 1  # sizes and strides are 32-bit integers


@functools.cache
def _product() -> Callable[..., None] | None:
    """The C function, or None where there is none or the processor has no bfloat16 instructions."""
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or "avx512_bf16" not in flags.read_text():
        return None
    try:
        library: Any = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        function = library.cblas_gemm_bf16bf16f32
    except (OSError, AttributeError):
        return None
    number, pointer, scale = ctypes.c_int, ctypes.c_void_p, ctypes.c_float
    function.restype = None
    function.argtypes = [
        *[number] * 6, scale, pointer, number, pointer, number, scale, pointer, number,
    ]  # fmt: skip
    return function


def available() -> bool:
    """Whether `multiply` works here."""
    return _product() is not None


def serves(out: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether out = a @ b is such a product: bfloat16 operands, float32 result, all on the CPU, strides it can take."""
    return (
        a.dtype == b.dtype == torch.bfloat16
        and out.dtype == torch.float32
        and not (a.is_cuda or b.is_cuda or out.is_cuda)
        and available()
        and out.stride(1) == 1
        and all(_leading(x) is not None for x in (a, b))
        and max(*out.shape, *a.shape, *a.stride(), *b.stride(), *out.stride()) <= LARGEST
    )


def _leading(x: Tensor) -> tuple[int, int] | None:
    """(layout, leading dimension) of a matrix that is row-major or the transpose of one; None for others."""
    rows, columns = x.shape
    if x.stride(1) == 1 and x.stride(0) >= columns:
        return AS_IS, x.stride(0)
    if x.stride(0) == 1 and x.stride(1) >= rows:
        return TRANSPOSED, x.stride(1)
    return None


def multiply(out: Tensor, a: Tensor, b: Tensor, beta: float = 0.0) -> None:
    """out = a @ b + beta · out for (m, k) and (k, n) of which `serves` is true. beta 0 does not read `out`."""
    function = _product()
    assert function is not None, "ask `serves` first"
    if out.numel() == 0:
        return
    if a.shape[1] == 0:
        out.mul_(beta) if beta else out.zero_()
        return
    left, right = _leading(a), _leading(b)
    assert left is not None
    assert right is not None
    function(
        ROW_MAJOR, left[0], right[0], out.shape[0], out.shape[1], a.shape[1], 1.0, a.data_ptr(), left[1],
        b.data_ptr(), right[1], beta, out.data_ptr(), out.stride(0),
    )  # fmt: skip
