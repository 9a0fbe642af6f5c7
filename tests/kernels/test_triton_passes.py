"""The Triton passes against torch in float64: interpreted without a GPU, compiled with one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import advgame_kernels as ak
from advgame_kernels import passes_torch, passes_triton
from advgame_kernels.types import LogProbs
from problems import grads_of, head_problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NARROW = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True, params=[16, 4096])
def block(request, monkeypatch):
    """Small blocks make short rows take several turns of the loop, with a tail."""
    monkeypatch.setattr(passes_triton, "BLOCK", request.param)
    return request.param


def chunk(rows: int, vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(rows + vocab)
    labels = torch.randint(0, vocab, (rows,), generator=g)
    labels[0], labels[-1] = vocab - 1, 0
    return (torch.randn(rows, vocab, generator=g) * 4).to(DEVICE, dtype), labels.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (2, 129)])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, 0.0), (0.6, 5.0)])
def test_statistics(dtype, shape, temperature, softcap):
    logits, labels = chunk(*shape, dtype)
    got = passes_triton.row_stats(logits, labels, temperature, softcap)
    want = passes_torch.row_stats(logits.double(), labels, temperature, softcap)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32)] + [(torch.float32, n) for n in NARROW])
@pytest.mark.parametrize("which", ["logps", "entropy", "lse", "all"])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, 0.0), (0.6, 5.0)])
def test_gradients_in_place(dtypes, which, temperature, softcap):
    logits, labels = chunk(3, 37, dtypes[0])
    ups = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    wanted = [u if which in ("all", name) else None for u, name in zip(ups, LogProbs._fields, strict=True)]
    stats = passes_torch.row_stats(logits, labels, temperature, softcap)
    exact = passes_torch.row_grads_(
        logits.double(), labels, LogProbs(*(s.double() for s in stats)),
        *(None if w is None else w.double() for w in wanted), temperature, softcap,
    )  # fmt: skip
    address = logits.data_ptr()
    got = passes_triton.row_grads_(logits, labels, stats.entropy, stats.lse, *wanted, temperature, softcap, dtypes[1])
    assert got.dtype == dtypes[1]
    assert got.data_ptr() == address
    tolerance = 3e-6 if dtypes[1] == torch.float32 else 2 * torch.finfo(dtypes[1]).eps
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)


def test_the_tail_of_the_vocabulary_counts_for_nothing():
    # verl 2899: columns past V taken as zero logits. Every logit far below zero shows it at once.
    logits = torch.full((2, 37), -60.0, device=DEVICE)
    labels = torch.tensor([0, 36], device=DEVICE)
    logps, entropy, lse = passes_triton.row_stats(logits, labels, 1.0, 0.0)
    want = torch.log(torch.tensor(37.0)).to(DEVICE).expand(2)
    torch.testing.assert_close(-logps, want)
    torch.testing.assert_close(entropy, want)
    torch.testing.assert_close(lse, want.double() - 60.0, rtol=1e-6, atol=0)


def test_masked_entries_at_the_front_and_within():
    logits, labels = chunk(2, 64, torch.float32)
    logits[:, :40] = float("-inf")
    labels[:] = 50
    got = passes_triton.row_stats(logits, labels, 1.0, 0.0)
    want = passes_torch.row_stats(logits.double(), labels)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=3e-6, atol=3e-6)
    ones = torch.ones(2, device=DEVICE)
    grad = passes_triton.row_grads_(logits, labels, got[1], got[2], ones, ones, ones, 1.0, 0.0, torch.float32)
    assert torch.isfinite(grad).all()
    assert not grad[:, :40].any()


@pytest.mark.parametrize("shape", [(2, 4096), (2, 262_147)] + ([(70_000, 5)] if DEVICE == "cuda" else []))
def test_large_shapes(shape, block):
    if block == 16 and DEVICE == "cpu":
        pytest.skip("the interpreter is slow on thousands of blocks")
    logits, labels = chunk(*shape, torch.float32)
    got = passes_triton.row_stats(logits, labels, 1.0, 0.0)
    want = passes_torch.row_stats(logits.double(), labels)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_linear_preference_loss_on_triton(dtype):
    narrow = head_problem([4, 3, 6, 2]).to(dtype)
    narrow = narrow._replace(
        **{k: getattr(narrow, k).detach().to(DEVICE).requires_grad_() for k in ("hidden", "weight")},
        labels=narrow.labels.to(DEVICE), ref_logps=narrow.ref_logps.to(DEVICE),
    )  # fmt: skip
    exact = narrow.to(torch.float64)
    args = (narrow.labels, narrow.bounds)
    out = ak.linear_preference_loss(
        narrow.hidden, narrow.weight, *args, narrow.ref_logps, entropy_weight=0.1, softcap=6.0, chunk_bytes=8 * 37 * 4,
        impl="triton",
    )  # fmt: skip
    want = ak.linear_preference_loss_ref(
        exact.hidden, exact.weight, *args, exact.ref_logps, entropy_weight=0.1, softcap=6.0
    )
    torch.testing.assert_close(out.margins.double(), want.margins, rtol=1e-5, atol=1e-5)
    got = grads_of(out.loss, narrow.hidden, narrow.weight)
    for a, b in zip(got, grads_of(want.loss, exact.hidden, exact.weight), strict=True):
        assert (a.double() - b).norm() <= (1e-5 if dtype == torch.float32 else 4e-3) * b.norm()


def test_custom_ops_pass_opcheck_and_stay_whole_under_compile(block):
    if block != 4096:
        pytest.skip("one block size is enough")
    logits, labels = chunk(2, 37, torch.float32)
    torch.library.opcheck(torch.ops.advgame_kernels.row_stats, (logits, labels, 1.0, 0.0))
    stats = passes_triton.row_stats(logits, labels, 1.0, 0.0)
    ones = torch.ones(2, device=DEVICE)
    torch.library.opcheck(
        torch.ops.advgame_kernels.row_grads_, (logits, labels, *stats[1:], ones, None, None, 1.0, 0.0, None)
    )
    seen = []

    def backend(graph, inputs):
        seen.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph.forward

    logits, labels = chunk(2, 37, torch.float32)
    compiled = torch.compile(
        lambda x: passes_triton.row_stats(x, labels, 1.0, 0.0)[0] * 2, backend=backend, fullgraph=True
    )
    torch.testing.assert_close(compiled(logits), passes_torch.row_stats(logits, labels).logps * 2)
    assert any("row_stats" in s for s in seen)
