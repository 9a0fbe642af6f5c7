"""The three matrix products of a linear head: logits, gradient of hidden, float32 gradient of the weight.

On CUDA all three are single cuBLAS calls with half-precision operands and float32 accumulation. cuBLAS writes
float32 from bfloat16 operands, which torch exposes as `mm.dtype_out` and `addmm.dtype_out`. The CPU backend has
neither: there MKL is asked directly where it can serve (gemm_mkl.py), and otherwise mixed precision goes through
float32 copies of a block of the vocabulary at a time. So do bfloat16 products on a processor without bfloat16
arithmetic: MKL's emulation there takes three times as long, and memory for a copy of the head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from advgame_kernels import gemm_mkl

CPU_BLOCK = 4096  # vocabulary rows converted to float32 at once
# Vocabulary rows of one float32 product on the CPU: MKL packs its right operand whole before it begins, a copy of the
# head's rows as long as the chunk is wide; in blocks the copy stays in the cache.
MKL_BLOCK = 8192


def _emulated(out: Tensor) -> bool:
    """Whether a product of out's dtype is better computed in float32."""
    return out.device.type == "cpu" and out.dtype == torch.bfloat16 and not gemm_mkl.native_bfloat16()


@torch.library.custom_op("advgame_kernels::accumulate_", mutates_args=("total",))
def _accumulate_(total: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
    # An operation of our own because torch.compile fails on this overload in torch 2.11.
    torch.ops.aten.addmm.dtype_out(total, dlogits.t(), hidden, total.dtype, out=total)


@_accumulate_.register_fake
def _(total: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
    return None


def logits_into(
    out: Tensor,  # (n, V) float32, or the dtype of hidden
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
) -> None:
    """out = hidden @ weight.T + bias."""
    if out.dtype == hidden.dtype and not _emulated(out):
        blocks = hidden.device.type == "cpu" and hidden.dtype == torch.float32 and not torch.compiler.is_compiling()
        step = MKL_BLOCK if blocks else weight.shape[0]
        for start in range(0, weight.shape[0], step):
            part, rows = out[:, start : start + step], weight[start : start + step].t()
            if bias is None:
                torch.mm(hidden, rows, out=part)
            else:
                torch.addmm(bias[start : start + step].to(hidden.dtype), hidden, rows, out=part)
        return
    if hidden.is_cuda:
        torch.ops.aten.mm.dtype_out(hidden, weight.t(), out.dtype, out=out)
    elif gemm_mkl.serves(out, hidden, weight.t()):
        gemm_mkl.product_into(out, hidden, weight.t())
    else:
        wide = hidden.float()
        for start in range(0, weight.shape[0], CPU_BLOCK):
            some = slice(start, start + CPU_BLOCK)
            block = wide @ weight[some].float().t()
            out[:, some] = block if bias is None else block.add_(bias[some])
        return
    if bias is not None:
        out += bias


def hidden_grad_into(
    out: Tensor,  # (n, H) dtype of weight
    dlogits: Tensor,  # (n, V) dtype of weight, rows may be strided
    weight: Tensor,  # (V, H)
) -> None:
    """out = dlogits @ weight."""
    if not _emulated(out):
        torch.mm(dlogits, weight, out=out)
        return
    total = torch.zeros(out.shape, dtype=torch.float32)
    for start in range(0, weight.shape[0], CPU_BLOCK):
        some = slice(start, start + CPU_BLOCK)
        total.addmm_(dlogits[:, some].float(), weight[some].float())
    out.copy_(total)


def add_weight_grad_(
    total: Tensor,  # (V, H) float32 (float64 for float64 operands)
    dlogits: Tensor,  # (n, V)
    hidden: Tensor,  # (n, H)
    fresh: bool = False,
) -> None:
    """total += dlogits.T @ hidden, accumulated in the dtype of `total` whatever the operands are.

    A `fresh` total is overwritten: the first chunk then needs neither zeros written before it nor a read of them.
    """
    if total.dtype == hidden.dtype:
        torch.addmm(total, dlogits.t(), hidden, beta=0 if fresh else 1, out=total)
        return
    if hidden.is_cuda:
        if fresh:
            torch.ops.aten.mm.dtype_out(dlogits.t(), hidden, total.dtype, out=total)
        else:
            _accumulate_(total, dlogits, hidden)
        return
    if gemm_mkl.serves(total, dlogits.t(), hidden):
        gemm_mkl.product_into(total, dlogits.t(), hidden, add=not fresh)
        return
    if fresh:
        total.zero_()
    wide = hidden.to(total.dtype)
    for start in range(0, total.shape[0], CPU_BLOCK):
        block = dlogits[:, start : start + CPU_BLOCK].t()
        total[start : start + CPU_BLOCK].addmm_(block.to(total.dtype), wide)
