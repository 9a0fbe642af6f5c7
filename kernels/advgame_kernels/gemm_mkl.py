"""bfloat16 matrix products with a float32 result on the CPU, by the MKL that torch's own library carries.

torch rounds the product of bfloat16 matrices to bfloat16 on the CPU; float32 logits and a float32 weight gradient
would have to go through float32 copies. The x86 wheels link MKL into libtorch_cpu.so and leave its C interface
visible, `cblas_gemm_bf16bf16f32` among it: bfloat16 operands, float32 sums, optionally added to what is there. It
is called here by address.

Used where that symbol is found and the processor multiplies bfloat16 itself (AVX512_BF16 or AMX); elsewhere MKL
would emulate it. ADVGAME_MKL_BF16=0 in the environment keeps it from being used at all.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112  # of cblas.h
INT_MAX = 2**31 - 1  # this interface counts rows, columns and strides in 32 bits; addresses inside it have 64


@functools.cache
def _function() -> Callable[..., None] | None:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not library.is_file():
        return None
    function = getattr(ctypes.CDLL(str(library)), "cblas_gemm_bf16bf16f32", None)
    if function is None:
        return None
    size, address, real = ctypes.c_int, ctypes.c_void_p, ctypes.c_float
    function.argtypes = [size] * 6 + [real, address, size, address, size, real, address, size]
    function.restype = None
    return function


@functools.cache
def native_bfloat16() -> bool:
    """Whether the processor has bfloat16 products; False where torch has no way of telling."""
    known = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask is not None and ask() for ask in known)


def available() -> bool:
    """Whether `product_into` can be used, and should be."""
    return os.environ.get("ADVGAME_MKL_BF16") != "0" and native_bfloat16() and _function() is not None


def serves(out: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether these operands are ones that `product_into` takes: bfloat16 in, float32 out, rows or columns dense."""
    if out.dtype != torch.float32 or a.dtype != torch.bfloat16 or b.dtype != torch.bfloat16:
        return False
    if out.device.type != "cpu" or not available():
        return False
    sizes = (*out.shape, *a.shape, *b.shape, *out.stride(), *a.stride(), *b.stride())
    dense = out.stride(1) == 1 and all(1 in x.stride() for x in (a, b))
    return dense and 0 not in sizes and max(sizes) <= INT_MAX


def _layout(x: Tensor) -> tuple[int, int]:
    """CBLAS's transposition flag and leading dimension of a matrix."""
    if x.stride(1) == 1:
        return PLAIN, max(x.stride(0), x.shape[1])
    return TRANSPOSED, max(x.stride(1), x.shape[0])


@torch.library.custom_op("advgame_kernels::bf16_product_", mutates_args=("out",))
def _product_into(out: Tensor, a: Tensor, b: Tensor, keep: float) -> None:
    function = _function()
    assert function is not None
    (rows, inner), columns = a.shape, b.shape[1]
    (flag_a, lead_a), (flag_b, lead_b) = _layout(a), _layout(b)
    function(
        ROW_MAJOR, flag_a, flag_b, rows, columns, inner, 1.0, a.data_ptr(), lead_a, b.data_ptr(), lead_b, keep,
        out.data_ptr(), max(out.stride(0), columns),
    )  # fmt: skip


@_product_into.register_fake
def _(out: Tensor, a: Tensor, b: Tensor, keep: float) -> None:
    return None


def product_into(
    out: Tensor,  # (M, N) float32, rows may be strided
    a: Tensor,  # (M, K) bfloat16, or the transpose of such
    b: Tensor,  # (K, N) bfloat16, or the transpose of such
    add: bool = False,
) -> None:
    """out = a @ b, or out += a @ b; the caller has asked `serves`."""
    _product_into(out, a, b, 1.0 if add else 0.0)
