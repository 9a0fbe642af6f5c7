"""torch.compile gives the same numbers, and the CUDA path asks no tensor for its value.

The second is shown without a GPU by fake CUDA tensors, which have shapes but no contents: any `.item()` and any branch
on data raises. It needs a CUDA build of torch, not a device.
"""

from __future__ import annotations

import advgame_kernels as ak
import pytest
import torch
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
