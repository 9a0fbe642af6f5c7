"""MKL's mixed product against float64, the path without it, and what it must refuse."""

from __future__ import annotations

import advgame_kernels as ak
import pytest
import torch
from advgame_kernels import gemm, gemm_mkl

needs_mkl = pytest.mark.skipif(
    not gemm_mkl.available(), reason="no bfloat16 product here; its twin, the float32 blocks, is tested below"
)


def operands(m: int, k: int, n: int, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(m * 1000 + n)
    return torch.randn(m, k, generator=g).to(dtype), torch.randn(k, n, generator=g).to(dtype)


@needs_mkl
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (3, 17, 5), (64, 128, 33), (200, 31, 4097)])
@pytest.mark.parametrize("left", ["plain", "transposed", "strided"])
@pytest.mark.parametrize("right", ["plain", "transposed"])
def test_product_is_exact_to_float32(m, k, n, left, right):
    a, b = operands(m, k, n)
    if left == "transposed":
        a = a.t().contiguous().t()
    elif left == "strided":
        a = torch.cat([a, a], dim=1)[:, :k]
    if right == "transposed":
        b = b.t().contiguous().t()
    exact = a.double() @ b.double()
    bound = 1e-6 * (a.double().abs() @ b.double().abs())
    out = torch.full((m, n), 7.0)
    assert gemm_mkl.serves(out, a, b)
    gemm_mkl.multiply(out, a, b)  # beta 0: the sevens must not be read
    assert ((out.double() - exact).abs() <= bound).all()
    gemm_mkl.multiply(out, a, b, beta=1.0)
    assert ((out.double() - 2 * exact).abs() <= 3 * bound).all()


@needs_mkl
def test_beta_zero_does_not_read_what_was_there():
    a, b = operands(4, 8, 5)
    out = torch.full((4, 5), float("nan"))
    gemm_mkl.multiply(out, a, b)
    assert out.isfinite().all()


@needs_mkl
def test_rows_of_a_larger_buffer_are_left_alone():
    a, b = operands(4, 8, 5)
    whole = torch.full((6, 9), 3.0)
    gemm_mkl.multiply(whole[1:5, :5], a, b)
    assert (whole[0] == 3).all()
    assert (whole[5] == 3).all()
    assert (whole[:, 5:] == 3).all()


@needs_mkl
def test_empty_sides():
    out = torch.ones(3, 2)
    gemm_mkl.multiply(out, torch.zeros(3, 0, dtype=torch.bfloat16), torch.zeros(0, 2, dtype=torch.bfloat16))
    assert (out == 0).all()
    gemm_mkl.multiply(out[:0], torch.zeros(0, 4, dtype=torch.bfloat16), torch.zeros(4, 2, dtype=torch.bfloat16))


def test_other_dtypes_and_layouts_are_not_served():
    a, b = operands(4, 8, 5)
    out = torch.empty(4, 5)
    assert not gemm_mkl.serves(out.bfloat16(), a, b)
    assert not gemm_mkl.serves(out, a.float(), b.float())
    assert not gemm_mkl.serves(out.t().contiguous().t(), a, b)
    assert not gemm_mkl.serves(out, torch.stack([a, a], dim=2)[:, :, 0], b)


@pytest.mark.parametrize("mkl", [pytest.param(True, marks=needs_mkl), False])
def test_both_paths_give_the_loss_and_its_gradients(mkl, monkeypatch):
    """The fused loss in bfloat16, several chunks, with MKL and with the float32 blocks, against float64."""
    if not mkl:
        monkeypatch.setattr(gemm_mkl, "serves", lambda *operands: False)
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(40, 32, generator=g).bfloat16()
    weight = (torch.randn(5000, 32, generator=g) / 6).bfloat16()
    labels = torch.randint(0, 5000, (40,), generator=g)
    bounds, ref = [0, 11, 18, 30, 40], torch.zeros(4)

    def run(h, w, **how):
        h, w = h.requires_grad_(), w.requires_grad_()
        out = ak.linear_preference_loss(h, w, labels, bounds, ref, **how)
        return (out.loss, out.margins, *torch.autograd.grad(out.loss, (h, w)))

    exact = run(hidden.double(), weight.double())
    found = run(hidden.clone(), weight.clone(), chunk_bytes=18 * 5000 * 4)
    for got, want in zip(found, exact, strict=True):
        size = want.abs().max()
        assert (got.double() - want).abs().max() <= 2**-7 * size


def test_float32_blocks_are_still_there(monkeypatch):
    monkeypatch.setattr(gemm_mkl, "serves", lambda *operands: False)
    a, b = operands(3, 8, 9000)
    out = torch.empty(3, 9000)
    gemm.logits_into(out, a, b.t().contiguous(), None)
    assert torch.allclose(out.double(), a.double() @ b.double(), atol=1e-5)
