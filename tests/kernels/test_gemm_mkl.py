"""bfloat16 products with float32 results on the CPU: MKL's, and the blocks that stand in for them elsewhere."""

from __future__ import annotations

import advgame_kernels as ak
import pytest
import torch
from advgame_kernels import gemm, gemm_mkl
from problems import grads_of, head_problem

NEEDS_MKL = pytest.mark.skipif(not gemm_mkl.available(), reason="no MKL in torch, or no bfloat16 in the processor")
PATHS = [pytest.param(True, marks=NEEDS_MKL, id="mkl"), pytest.param(False, id="blocks")]


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Both ways, whatever this machine would choose."""
    if not request.param:
        monkeypatch.setattr(gemm_mkl, "available", lambda: False)
    return request.param


def matrices(rows: int, inner: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(rows + inner + columns)
    return torch.randn(rows, inner, generator=g).bfloat16(), torch.randn(inner, columns, generator=g).bfloat16()


@NEEDS_MKL
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 5), (3, 1, 2), (17, 64, 33), (130, 31, 257)])
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
def test_products_of_every_layout(shape, transposed):
    a, b = matrices(*shape)
    exact = a.double() @ b.double()
    a, b = (x.t().contiguous().t() if turn else x for x, turn in zip((a, b), transposed, strict=True))
    wide = torch.full((shape[0], shape[2] + 3), 7.0)  # the result's rows have gaps
    out = wide[:, : shape[2]]
    assert gemm_mkl.serves(out, a, b)
    gemm_mkl.product_into(out, a, b)
    tolerance = 1e-6 * shape[1] ** 0.5 * 4
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=tolerance)
    gemm_mkl.product_into(out, a, b, add=True)
    torch.testing.assert_close(out.double(), 2 * exact, rtol=1e-5, atol=2 * tolerance)
    assert (wide[:, shape[2] :] == 7.0).all()


@NEEDS_MKL
def test_what_it_does_not_serve(monkeypatch):
    a, b = matrices(4, 6, 8)
    out = torch.empty(4, 8)
    assert not gemm_mkl.serves(out, a.float(), b)
    assert not gemm_mkl.serves(out.bfloat16(), a, b)
    assert not gemm_mkl.serves(out, torch.empty(4, 12, dtype=torch.bfloat16)[:, ::2], b)
    assert not gemm_mkl.serves(out[:0], a[:0], b)
    monkeypatch.setattr(gemm_mkl, "INT_MAX", 7)  # as a vocabulary beyond 2^31 would be
    assert not gemm_mkl.serves(out, a, b)
    monkeypatch.undo()
    monkeypatch.setenv("ADVGAME_MKL_BF16", "0")
    assert not gemm_mkl.serves(out, a, b)


def test_logits_and_weight_gradient(path):
    rows, width, vocab = 9, 24, gemm.CPU_BLOCK + 5
    hidden, weight = matrices(rows, width, vocab)
    weight = weight.t().contiguous()
    bias = torch.linspace(-1, 1, vocab).bfloat16()
    logits = torch.empty(rows, vocab)
    gemm.logits_into(logits, hidden, weight, bias)
    torch.testing.assert_close(
        logits.double(), hidden.double() @ weight.double().t() + bias.double(), rtol=1e-5, atol=5e-6
    )
    dlogits = (logits * 0.01).bfloat16()
    share = dlogits.double().t() @ hidden.double()
    total = torch.full((vocab, width), float("nan"))
    gemm.add_weight_grad_(total, dlogits, hidden, fresh=True)
    torch.testing.assert_close(total.double(), share, rtol=1e-5, atol=1e-5)
    gemm.add_weight_grad_(total, dlogits, hidden)
    torch.testing.assert_close(total.double(), 2 * share, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_products_that_stay_bfloat16(monkeypatch, native, with_bias):
    """Rounded once, whether the processor multiplies bfloat16 or float32 blocks do it."""
    monkeypatch.setattr(gemm_mkl, "native_bfloat16", lambda: native)
    rows, width, vocab = 9, 24, gemm.CPU_BLOCK + 5
    hidden, weight = matrices(rows, width, vocab)
    weight = weight.t().contiguous()
    bias = torch.linspace(-1, 1, vocab).bfloat16() if with_bias else None
    logits, exact = torch.full((rows, vocab), float("nan")).bfloat16(), hidden.double() @ weight.double().t()
    gemm.logits_into(logits, hidden, weight, bias)
    exact = exact if bias is None else exact + bias.double()
    torch.testing.assert_close(logits.double(), exact, rtol=2**-8, atol=1e-5)
    grad = torch.full((rows, width), float("nan")).bfloat16()
    gemm.hidden_grad_into(grad, logits, weight)
    torch.testing.assert_close(grad.double(), logits.double() @ weight.double(), rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("skip_below", [0.0, 1e-9])
def test_loss_and_gradients(path, skip_below):
    narrow = head_problem([40, 23, 31, 55], vocab=501, width=32).to(torch.bfloat16)
    exact = narrow.to(torch.float64)
    args = (narrow.labels, narrow.bounds, narrow.ref_logps)
    out = ak.linear_preference_loss(
        narrow.hidden, narrow.weight, *args, chunk_bytes=70 * 501 * 4, skip_below=skip_below
    )
    want = ak.linear_preference_loss_ref(exact.hidden, exact.weight, *args[:2], exact.ref_logps)
    torch.testing.assert_close(out.margins.double(), want.margins, rtol=1e-5, atol=1e-4)
    got = grads_of(out.loss, narrow.hidden, narrow.weight)
    for a, b in zip(got, grads_of(want.loss, exact.hidden, exact.weight), strict=True):
        assert (a.double() - b).norm() <= 4e-3 * b.norm()  # one rounding to bfloat16, and that of the factors


@pytest.mark.slow
def test_compiled_in_bfloat16(path):
    p = head_problem([5, 3, 2, 4]).to(torch.bfloat16)

    def step(hidden, weight):
        return ak.linear_preference_loss(torch.tanh(hidden), weight, p.labels, p.bounds, p.ref_logps).loss

    got = torch.autograd.grad(torch.compile(step, backend="aot_eager")(p.hidden, p.weight), (p.hidden, p.weight))
    want = torch.autograd.grad(step(p.hidden, p.weight), (p.hidden, p.weight))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
