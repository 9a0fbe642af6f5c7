"""linear_logprobs against whole logits in float64, and the chunking around it."""

from __future__ import annotations

import advgame_kernels as ak
import pytest
import torch
from problems import head_problem


def whole(p, **settings):
    return ak.linear_logprobs_ref(p.hidden, p.weight, p.labels, **settings)


@pytest.mark.parametrize("chunk_rows", [1, 3, 1000])
@pytest.mark.parametrize("extras", [{}, {"temperature": 0.6}, {"softcap": 3.0}, {"softcap": 3.0, "temperature": 1.7}])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_match_whole_logits(chunk_rows, extras, with_bias):
    p = head_problem([5, 3, 9, 1])
    if with_bias:
        extras = extras | {"bias": p.bias}
    leaves = [p.hidden, p.weight] + ([p.bias] if with_bias else [])
    ups = [torch.randn(18, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)]
    want, out = (
        whole(p, **extras),
        ak.linear_logprobs(p.hidden, p.weight, p.labels, chunk_bytes=chunk_rows * 37 * 8, **extras),
    )
    for a, b in zip(out, want, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(torch.autograd.grad(out, leaves, ups), torch.autograd.grad(want, leaves, ups), strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    p = head_problem([2, 3], vocab=11, width=3)
    assert torch.autograd.gradcheck(
        lambda h, w, b: tuple(
            ak.linear_logprobs(h, w, p.labels, bias=b, softcap=2.0, temperature=0.7, chunk_bytes=180)
        ),
        (p.hidden, p.weight, p.bias),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logits_dtype", [None, "own"])
@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_narrow_dtypes_stay_within_twice_the_eager_error(dtype, logits_dtype, impl):
    exact = head_problem([40, 23, 31, 55], vocab=501, width=32)
    narrow = exact.to(dtype)
    exact = narrow.to(torch.float64)
    want, eager = whole(exact), whole(narrow)
    out = ak.linear_logprobs(
        narrow.hidden, narrow.weight, narrow.labels, logits_dtype=dtype if logits_dtype else None, impl=impl,
        chunk_bytes=37 * 501 * 4,
    )  # fmt: skip
    for got, low, high in zip(out, eager, want, strict=True):
        bound = 2 * (low.double() - high).abs().max() + 1e-6
        assert (got.double() - high).abs().max() <= bound
    leaves = (narrow.hidden, narrow.weight)
    for got, low, high in zip(
        torch.autograd.grad(out.logps.sum(), leaves),
        torch.autograd.grad(eager.logps.sum(), leaves),
        torch.autograd.grad(want.logps.sum(), (exact.hidden, exact.weight)),
        strict=True,
    ):
        assert got.dtype == dtype
        assert (got.double() - high).norm() <= 2 * (low.double() - high).norm() + 1e-5


def test_frozen_head_and_frozen_hidden_and_no_grad():
    p = head_problem([4, 4])
    out = ak.linear_logprobs(p.hidden, p.weight.detach(), p.labels)
    assert torch.autograd.grad(out.logps.sum(), p.hidden)[0].shape == p.hidden.shape
    out = ak.linear_logprobs(p.hidden.detach(), p.weight, p.labels)
    assert torch.autograd.grad(out.logps.sum(), p.weight)[0].shape == p.weight.shape
    with torch.no_grad():
        assert not ak.linear_logprobs(p.hidden, p.weight, p.labels).logps.requires_grad


def test_no_rows_and_one_row():
    for lengths in ([], [1, 0]):
        p = head_problem(lengths)
        out = ak.linear_logprobs(p.hidden, p.weight, p.labels)
        grads = torch.autograd.grad(out.logps.sum(), (p.hidden, p.weight))
        assert grads[1].shape == p.weight.shape
        assert torch.isfinite(grads[1]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3)}, "hidden"),
        ({"weight": torch.zeros(5, 3)}, "weight"),
        ({"weight": torch.zeros(5, 2, dtype=torch.bfloat16)}, "weight"),
        ({"labels": torch.tensor([0, 1, 5])}, "labels"),
        ({"bias": torch.zeros(4)}, "bias"),
        ({"softcap": -1.0}, "softcap"),
        ({"temperature": float("inf")}, "temperature"),
        ({"chunk_bytes": 0}, "chunk_bytes"),
        ({"logits_dtype": torch.bfloat16}, "logits_dtype"),
        ({"impl": "fast"}, "impl"),
    ],
)
def test_refusals_name_the_argument(change, message):
    call = {"hidden": torch.zeros(3, 2), "weight": torch.zeros(5, 2), "labels": torch.tensor([0, 1, 4])} | change
    with pytest.raises(ValueError, match=message):
        ak.linear_logprobs(call.pop("hidden"), call.pop("weight"), call.pop("labels"), **call)
