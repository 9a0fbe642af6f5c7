"""selective_logprobs against torch's log_softmax in float64, over implementations, dtypes and awkward logits."""

from __future__ import annotations

import advgame_kernels as ak
import pytest
import torch
from advgame_kernels import native, passes_torch
from advgame_kernels.types import LogProbs

IMPLS = ["torch", pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="no extension"))]
SHAPES = [(1, 1), (1, 5), (3, 16), (7, 37), (4, 1000), (70000, 3)]


def make(rows: int, vocab: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(rows * 1009 + vocab)
    labels = torch.randint(0, vocab, (rows,), generator=g)
    labels[0], labels[-1] = 0, vocab - 1
    return (torch.randn(rows, vocab, generator=g) * scale).to(dtype), labels


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_match_float64(impl, dtype, shape, temperature):
    logits, labels = make(*shape, dtype)
    ups = [torch.randn(shape[0], generator=torch.Generator().manual_seed(i)) for i in range(3)]
    exact_in = logits.double().requires_grad_()
    exact = ak.selective_logprobs_ref(exact_in, labels, temperature=temperature)
    torch.autograd.backward(list(exact), [u.double() for u in ups])
    logits.requires_grad_()
    out = ak.selective_logprobs(logits, labels, temperature=temperature, impl=impl)
    torch.autograd.backward(list(out), ups)
    for got, want in zip(out, exact, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)
    tolerance = 4e-3 if dtype == torch.bfloat16 else 3e-6
    # A float32 lse of about 20 is rounded by 1e-6, and every probability with it.
    torch.testing.assert_close(logits.grad.double(), exact_in.grad, rtol=tolerance, atol=1e-5)


def test_gradcheck_of_all_outputs():
    logits, labels = make(4, 9, torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(ak.selective_logprobs(x, labels, temperature=0.8)), (logits,))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("offset", [-1e4, -80.0, 1e4])
def test_logits_far_from_zero(impl, offset):
    # 1/64 is representable beside 1e4 in float32, so the shifted problem is exactly the unshifted one.
    logits, labels = make(5, 333, torch.float32)
    logits = (logits * 64).round() / 64
    near = ak.selective_logprobs_ref(logits.double(), labels)
    far = ak.selective_logprobs(logits + offset, labels, impl=impl)
    torch.testing.assert_close(far.logps.double(), near.logps, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(far.entropy.double(), near.entropy, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_vocabulary_entries_are_no_nan(impl):
    logits, labels = make(6, 50, torch.float32)
    logits[:, 10:30] = float("-inf")
    logits[2] = float("-inf")
    logits[2, 7] = 1.5  # one possible token: entropy 0
    labels[:] = 40
    labels[2] = 7
    logits.requires_grad_()
    out = ak.selective_logprobs(logits, labels, impl=impl)
    (out.logps.sum() + out.entropy.sum() + out.lse.sum()).backward()
    assert all(torch.isfinite(x).all() for x in out)
    assert torch.isfinite(logits.grad).all()
    assert out.entropy[2].item() == 0.0
    assert (logits.grad[:, 10:30] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_large_vocabulary_and_row_stride(impl):
    logits, labels = make(3, 262_147, torch.float32)
    wide = torch.cat([logits, torch.full((3, 5), 1e4)], dim=1)[:, :262_147]  # what lies beyond a row must not be read
    out = ak.selective_logprobs(wide, labels, impl=impl)
    want = ak.selective_logprobs_ref(logits.double(), labels)
    torch.testing.assert_close(out.lse.double(), want.lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.entropy.double(), want.entropy, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_inplace_backward_takes_the_memory_of_the_logits_once(impl):
    base, labels = make(5, 40, torch.float32)
    base.requires_grad_()
    logits = base * 1.0
    plain = torch.autograd.grad(ak.selective_logprobs(logits, labels, impl=impl).logps.sum(), base)[0]
    logits = base * 1.0
    out = ak.selective_logprobs(logits, labels, inplace_backward=True, impl=impl).logps.sum()
    (grad,) = torch.autograd.grad(out, logits, retain_graph=True)
    assert grad.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(grad, plain)
    with pytest.raises(RuntimeError, match="one backward pass"):
        torch.autograd.grad(out, logits)


@pytest.mark.parametrize("impl", IMPLS)
def test_retained_graph_used_twice(impl):
    logits, labels = make(5, 40, torch.float32)
    logits.requires_grad_()
    loss = ak.selective_logprobs(logits, labels, impl=impl).logps.sum()
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss * 2.0, logits)[0] / 2)


def test_no_rows():
    logits = torch.zeros(0, 7, requires_grad=True)
    out = ak.selective_logprobs(logits, torch.zeros(0, dtype=torch.int64))
    assert [tuple(x.shape) for x in out] == [(0,)] * 3
    out.logps.sum().backward()
    assert logits.grad.shape == (0, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, "logits"),
        ({"logits": torch.zeros(2, 4, dtype=torch.int64)}, "logits"),
        ({"logits": torch.zeros(4, 2).t()}, "logits: expected unit stride"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels"),
        ({"labels": torch.zeros(2, dtype=torch.int32)}, "labels"),
        ({"labels": torch.tensor([0, 4])}, r"labels: expected ids in \[0, 4\)"),
        ({"labels": torch.tensor([-100, 1])}, r"labels: expected ids in \[0, 4\)"),
        ({"temperature": 0.0}, "temperature"),
        ({"impl": "cuda"}, "impl"),
    ],
)
def test_refusals_name_the_argument(change, message):
    call = {"logits": torch.zeros(2, 4), "labels": torch.tensor([0, 1])} | change
    with pytest.raises(ValueError, match=message):
        ak.selective_logprobs(call.pop("logits"), call.pop("labels"), **call)


@pytest.mark.skipif(not native.available(), reason="no extension")
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set_agrees(isa):
    used = native.isa()
    try:
        native._native.use_isa(isa)
    except ValueError:
        pytest.skip(f"this processor has no {isa}")
    try:
        for dtype in (torch.float32, torch.bfloat16):
            logits, labels = make(9, 333, dtype)
            ups = [torch.randn(9, generator=torch.Generator().manual_seed(i)) for i in range(3)]
            exact, leaf = logits.double().requires_grad_(), logits.requires_grad_()
            want = ak.selective_logprobs_ref(exact, labels, temperature=0.8)
            out = ak.selective_logprobs(leaf, labels, temperature=0.8, impl="native")
            for a, b in zip(out, want, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)
            (got,) = torch.autograd.grad(list(out), leaf, ups)
            (high,) = torch.autograd.grad(list(want), exact, [u.double() for u in ups])
            tolerance = 4e-3 if dtype == torch.bfloat16 else 3e-6
            torch.testing.assert_close(got.double(), high, rtol=tolerance, atol=1e-5)
            # a bfloat16 gradient of float32 logits, soft-capped: what a chunk of a bfloat16 head takes
            raw = logits.detach().float()
            stats = native.row_stats(raw, labels, 0.8, 5.0)
            high = passes_torch.row_grads_(
                raw.double(), labels, LogProbs(*(x.double() for x in stats)), *(u.double() for u in ups), 0.8, 5.0
            )
            got = native.row_grads_(raw, labels, stats, *ups, 0.8, 5.0, torch.bfloat16)
            torch.testing.assert_close(got.double(), high, rtol=4e-3, atol=1e-5)
    finally:
        native._native.use_isa(used)


@pytest.mark.skipif(not native.available(), reason="no extension")
def test_threads_share_rows_and_tensors_without_gaps():
    before = torch.get_num_threads()
    logits, labels = make(501, 333, torch.float32)
    g = torch.Generator().manual_seed(0)
    params = [torch.randn(n, generator=g) for n in (70_001, 5, 200_003, 0, 17)]
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            leaf = logits.clone().requires_grad_()
            out = ak.selective_logprobs(leaf, labels, impl="native")
            shadow = [torch.zeros_like(p) for p in params]
            ak.ema_update_(shadow, params, 0.5, impl="native")
            results.append([*out, *torch.autograd.grad(out.logps.sum(), leaf), *shadow])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
