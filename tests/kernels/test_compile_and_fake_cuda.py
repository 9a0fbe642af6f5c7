"""torch.compile gives the same numbers, and the CUDA path asks no tensor for its value.

The second is shown without a GPU by tensors that have shapes but no contents: any `.item()` and any branch on data
raises. Fake CUDA tensors need a CUDA build of torch, not a device; meta tensors need nothing and take the same path
through the operators of the Triton passes.
"""

from __future__ import annotations

import advgame_kernels as ak
import pytest
import torch
from advgame_kernels import native, passes
from advgame_kernels.patch import compact
from problems import head_problem
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.mark.slow
def test_compiled_training_step_gives_the_same_gradients():
    p = head_problem([5, 3, 2, 4]).to(torch.float32)

    def step(hidden, weight, bounds):
        return ak.linear_preference_loss(torch.tanh(hidden), weight, p.labels, bounds, p.ref_logps).loss * 2

    compiled = torch.compile(step, backend="aot_eager")
    for bounds in (p.bounds, [0, 4, 8, 10, 14]):
        got = torch.autograd.grad(compiled(p.hidden, p.weight, bounds), (p.hidden, p.weight))
        want = torch.autograd.grad(step(p.hidden, p.weight, bounds), (p.hidden, p.weight))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
@pytest.mark.parametrize(
    ("dtype", "logits_dtype"), [(torch.bfloat16, None), (torch.bfloat16, torch.bfloat16), (torch.float32, None)]
)
def test_the_cuda_path_reads_no_tensor(dtype, logits_dtype, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)  # the one call that wants a driver
    settings = {"chunk_bytes": 1000 * 4 * 1200, "logits_dtype": logits_dtype}
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden = torch.randn(4096, 64, device="cuda", dtype=dtype, requires_grad=True)
        weight = torch.randn(1000, 64, device="cuda", dtype=dtype, requires_grad=True)
        bias = torch.zeros(1000, device="cuda", dtype=dtype, requires_grad=True)
        labels = torch.zeros(4096, dtype=torch.int64, device="cuda")
        ones, ref = torch.ones(4096, device="cuda"), torch.zeros(4, device="cuda")
        bounds = [0, 500, 1000, 3000, 4096]  # the second pair is longer than a chunk
        out = ak.linear_preference_loss(
            hidden, weight, labels, bounds, ref, bias=bias, entropy_weight=0.1, nll_weight=0.1, **settings
        )
        assert out.loss.device.type == out.margins.device.type == "cuda"
        assert out.loss.requires_grad
        ak.linear_policy_loss(hidden, weight, labels, ones, ones, ref_logps=ones, kl_beta=0.1, **settings)
        ak.linear_logprobs(hidden, weight, labels, **settings)
        ak.preference_loss(ref, ref, kind="ipo")
        ak.policy_loss(ones, ones, ones, old_logps=ones, clip=0.2)


NEEDS_TRITON = pytest.mark.skipif(passes.triton_reason() is not None, reason="no Triton")
NATIVE = pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="no extension"))
NAMES = ("selective_logprobs", "linear_logprobs", "preference_loss", "linear_preference_loss", "policy_loss",
         "linear_policy_loss")  # fmt: skip


def scalar(name, hidden, weight, labels, bounds, ref, **settings):
    """A differentiable scalar of the function, with work of torch's own before and after it."""
    x = torch.tanh(hidden)
    t = torch.ones_like(x[:, 0].detach())
    if name == "selective_logprobs":
        out = sum(ak.selective_logprobs(x @ weight.t(), labels, **settings)).sum()
    elif name == "linear_logprobs":
        out = sum(ak.linear_logprobs(x, weight, labels, chunk_bytes=5 * 37 * 4, **settings)).sum()
    elif name == "preference_loss":
        out = ak.preference_loss((x @ weight.t()).sum(1)[:4], ref, **settings).loss
    elif name == "linear_preference_loss":
        out = ak.linear_preference_loss(x, weight, labels, bounds, ref, chunk_bytes=8 * 37 * 4, **settings).loss
    elif name == "policy_loss":
        out = ak.policy_loss((x @ weight.t()).sum(1), t, t, ref_logps=t, kl_beta=0.1, **settings).loss
    else:
        out = ak.linear_policy_loss(x, weight, labels, t, t, ref_logps=t, kl_beta=0.1, **settings).loss
    return out * 2


@pytest.mark.slow
@pytest.mark.parametrize("impl", [NATIVE, pytest.param("triton", marks=NEEDS_TRITON)])
@pytest.mark.parametrize("name", NAMES)
def test_every_function_compiles_without_a_graph_break(name, impl):
    if impl == "triton" and torch.cuda.is_available():
        pytest.skip("the tensors are on the CPU")
    p = head_problem([5, 3, 2, 4]).to(torch.float32)

    def step(hidden, weight):
        return scalar(name, hidden, weight, p.labels, p.bounds, p.ref_logps, impl=impl)

    leaves = (p.hidden, p.weight)
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(step(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


@NEEDS_TRITON
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same is run on the GPU itself")
@pytest.mark.parametrize("name", NAMES)
def test_the_triton_path_reads_no_tensor(name):
    with torch.device("meta"):
        hidden, weight = torch.empty(14, 8, requires_grad=True), torch.empty(37, 8, requires_grad=True)
        labels, ref = torch.empty(14, dtype=torch.int64), torch.empty(4)
    loss = scalar(name, hidden, weight, labels, [0, 5, 8, 10, 14], ref, impl="triton")
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert [g.shape for g in grads] == [hidden.shape, weight.shape]
    assert grads[0].is_meta


def test_packing_with_known_lengths_reads_no_tensor():
    scored = compact(torch.empty(2, 9, 8, device="meta"), torch.empty(2, 9, dtype=torch.int64, device="meta"), [3, 5])
    assert (scored.rows.shape, scored.lengths) == ((8, 8), [3, 5])
