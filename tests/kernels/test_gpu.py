"""What only a GPU can show: no host sync, bounded memory, very many rows. Accuracy has its CPU twins elsewhere."""

from __future__ import annotations

import advgame_kernels as ak
import pytest
import torch
from advgame_kernels.patch import compact

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def problem(rows: int, vocab: int, width: int, sequences: int):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=g).to("cuda", torch.bfloat16).requires_grad_()
    weight = (torch.randn(vocab, width, generator=g) / width**0.5).to("cuda", torch.bfloat16).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), generator=g).cuda()
    bounds = [rows * i // sequences for i in range(sequences + 1)]
    return hidden, weight, labels, bounds, torch.zeros(sequences, device="cuda")


def test_no_host_sync():
    hidden, weight, labels, bounds, ref = problem(512, 4096, 128, 8)
    ones = torch.ones(512, device="cuda")
    logits = torch.zeros(512, 4096, device="cuda", requires_grad=True)
    logps, tokens = (ref - 1.0).requires_grad_(), (ones - 2.0).requires_grad_()
    states, padded = torch.zeros(2, 9, 128, device="cuda"), torch.zeros(2, 9, dtype=torch.int64)
    padded[0, 4:] = padded[1, :4] = -100
    padded = padded.cuda()
    shadow, copy = [torch.zeros(1000, device="cuda")], [torch.zeros(1000, device="cuda", dtype=torch.bfloat16)]

    bias = torch.zeros(4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    pairs, eight = torch.tensor(4.0, device="cuda"), torch.full((8,), 64, device="cuda")
    copied = (logits * 1.0).detach().requires_grad_()

    def everything():
        for kind in ("ipo", "simpo"):
            ak.linear_preference_loss(
                hidden, weight, labels, bounds, ref, kind=kind, bias=bias, nll_weight=0.1, entropy_weight=0.1,
                normalizer=pairs, softcap=20.0, temperature=0.7, logits_dtype=torch.bfloat16,
            ).loss.backward()  # fmt: skip
        with torch.no_grad():
            ak.linear_preference_loss(hidden, weight, labels, bounds, ref)
        ak.linear_preference_loss(hidden, weight.detach(), labels, bounds, ref).loss.backward()
        ak.linear_policy_loss(
            hidden, weight, labels, ones, ones, old_logps=-ones, sampler_logps=-ones, clip=0.2, truncation=2.0,
            entropy_weight=0.1,
        ).loss.backward()  # fmt: skip
        ak.preference_loss(logps, ref, lengths=eight, average=True, normalizer=pairs).loss.backward()
        ak.selective_logprobs(copied, labels, inplace_backward=True).logps.sum().backward()
        ak.linear_preference_loss(hidden, weight, labels, bounds, ref, chunk_bytes=1 << 21).loss.backward()
        ak.linear_policy_loss(hidden, weight, labels, ones, ones).loss.backward()
        ak.linear_logprobs(hidden, weight, labels).logps.sum().backward()
        ak.preference_loss(logps, ref).loss.backward()
        ak.policy_loss(tokens, ones, ones, ref_logps=ones, kl_beta=0.1).loss.backward()
        ak.selective_logprobs(logits, labels).logps.sum().backward()
        scored = compact(states, padded, [3, 5])
        assert scored.rows.shape == (8, 128)
        ak.ema_update_(shadow, shadow, 0.5, publish=copy)

    everything()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bfloat16_gradients_and_margins_against_float64():
    hidden, weight, labels, bounds, ref = problem(512, 4099, 128, 8)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    eager = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    want = ak.linear_preference_loss_ref(*exact, labels, bounds, ref.double())
    low = ak.linear_preference_loss_ref(*eager, labels, bounds, ref)
    out = ak.linear_preference_loss(hidden, weight, labels, bounds, ref, chunk_bytes=150 * 4099 * 4)
    assert (out.margins - want.margins).abs().max() <= 2 * (low.margins - want.margins).abs().max() + 1e-4
    for a, b, c in zip(
        torch.autograd.grad(out.loss, (hidden, weight)),
        torch.autograd.grad(low.loss, eager),
        torch.autograd.grad(want.loss, exact),
        strict=True,
    ):
        assert (a.double() - c).norm() <= 2 * (b.double() - c).norm() + 1e-6


def test_memory_is_one_chunk_and_one_float32_weight_gradient():
    hidden, weight, labels, bounds, ref = problem(8192, 32_768, 512, 16)
    chunk = 64 << 20
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = ak.linear_preference_loss(hidden, weight, labels, bounds, ref, chunk_bytes=chunk)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    assert out.loss.requires_grad
    assert extra <= chunk + 4 * weight.numel() + 2 * hidden.numel() + (4 << 20)


def test_more_than_65535_rows():
    hidden, weight, labels, bounds, ref = problem(70_000, 257, 16, 2)
    with torch.no_grad():
        out = ak.linear_preference_loss(hidden, weight, labels, bounds, ref, chunk_bytes=80_000 * 257 * 4)
        want = ak.linear_preference_loss_ref(hidden.double(), weight.double(), labels, bounds, ref.double())
    torch.testing.assert_close(out.logps.double(), want.logps, rtol=1e-5, atol=1e-2)
