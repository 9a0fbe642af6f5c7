"""Faults that other libraries had in these losses, one test each; the rest of the list lives with what it is about:

vocabulary tail: test_triton_passes, test_exactness; gradient filters: test_skipping; weight gradients summed in
bfloat16: test_linear_preference; ZeRO-3: test_zero3; adapters on the head, everything masked: test_modules_and_patch,
test_policy_loss; one row, ends of the vocabulary: test_exactness; tied weights, retained graphs: test_linear_preference
and here; non-unit upstream gradients: everywhere. Triton: no kernel has a dot, an autotuner, warp specialisation or a
descriptor (here); kernels of in-place passes run once.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import advgame_kernels as ak
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from advgame_kernels import patch
from problems import grads_of, head_problem
from test_modules_and_patch import batch, tiny_model

LENGTHS = [5, 3, 9, 1, 2, 2, 12, 7]


def test_two_micro_batches_are_one_batch():
    """TRL 5890, 6024: the normaliser is the whole batch's, whatever the micro-batches hold."""
    p = head_problem(LENGTHS)
    whole = ak.linear_preference_loss(p.hidden, p.weight, p.labels, p.bounds, p.ref_logps, nll_weight=0.3)
    want = grads_of(whole.loss, p.hidden, p.weight)
    for cut in (1, 3):  # pairs in the first one
        row = p.bounds[2 * cut]
        halves = [
            (slice(0, row), p.bounds[: 2 * cut + 1], p.ref_logps[: 2 * cut]),
            (slice(row, None), [b - row for b in p.bounds[2 * cut :]], p.ref_logps[2 * cut :]),
        ]
        loss = sum(
            ak.linear_preference_loss(
                p.hidden[rows], p.weight, p.labels[rows], bounds, ref, nll_weight=0.3, normalizer=4
            ).loss
            for rows, bounds, ref in halves
        )
        torch.testing.assert_close(loss, whole.loss)
        for a, b in zip(grads_of(loss, p.hidden, p.weight), want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_more_than_65535_rows(impl):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(70_000, 2, generator=g).requires_grad_()
    weight = torch.randn(5, 2, generator=g).requires_grad_()
    labels = torch.randint(0, 5, (70_000,), generator=g)
    args = (labels, [0, 40_000, 70_000], torch.tensor([-60_000.0, -45_000.0]))
    found = []
    for fn, leaves, kw in (
        (ak.linear_preference_loss, (hidden, weight), {"impl": impl}),
        (ak.linear_preference_loss_ref, (hidden.double(), weight.double()), {}),
    ):
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = fn(*leaves, *args[:2], args[2].to(leaves[0].dtype), kind="ipo", beta=0.5, **kw)
        found.append([out.logps, *torch.autograd.grad(out.loss, leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_a_vocabulary_above_250_thousand_with_logits_far_below_zero(impl):
    vocab = 262_147
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 4, generator=g), torch.randn(vocab, 4, generator=g)
    bias = torch.full((vocab,), -1000.0)  # a logit of zero, from a tail or a mask, would take all of the probability
    labels = torch.tensor([0, vocab - 1, 5, vocab - 1, 0, 77])
    found = []
    for fn, dtype, kw in (
        (ak.linear_logprobs, torch.float32, {"impl": impl}), (ak.linear_logprobs_ref, torch.float64, {}),
    ):  # fmt: skip
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        out = fn(*leaves, labels, bias=bias.to(dtype), **kw)
        found.append([*out, *torch.autograd.grad(out.logps.sum(), leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("name", ["linear_logprobs", "linear_policy_loss", "policy_loss", "preference_loss"])
def test_a_retained_graph_used_twice(name):
    p = head_problem([5, 3, 2, 4])
    ones = torch.ones(14, dtype=torch.float64)
    logps = (p.ref_logps - 1.0).requires_grad_()
    tokens = (-ones).requires_grad_()
    loss, leaves = {
        "linear_logprobs": lambda: (
            ak.linear_logprobs(p.hidden, p.weight, p.labels).logps.sum(), (p.hidden, p.weight)
        ),
        "linear_policy_loss": lambda: (
            ak.linear_policy_loss(p.hidden, p.weight, p.labels, ones, ones).loss, (p.hidden, p.weight)
        ),
        "policy_loss": lambda: (ak.policy_loss(tokens, ones, ones).loss, (tokens,)),
        "preference_loss": lambda: (ak.preference_loss(logps, p.ref_logps).loss, (logps,)),
    }[name]()  # fmt: skip
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(3 * loss, leaves), strict=True):
        torch.testing.assert_close(3 * a, b)


@pytest.mark.parametrize("which", ["frozen head", "frozen hidden", "no grad"])
@pytest.mark.parametrize("name", ["linear_policy_loss", "linear_logprobs"])
def test_nothing_unasked_is_computed(name, which, monkeypatch):
    from advgame_kernels import gemm, passes

    calls = []
    for module, called in ((gemm, "hidden_grad_into"), (gemm, "add_weight_grad_"), (passes, "row_grads_")):
        real = getattr(module, called)
        monkeypatch.setattr(module, called, lambda *a, n=called, real=real, **k: calls.append(n) or real(*a, **k))
    p = head_problem([5, 3, 2, 4])
    ones = torch.ones(14, dtype=torch.float64)
    hidden = p.hidden.detach() if which == "frozen hidden" else p.hidden
    weight = p.weight.detach() if which == "frozen head" else p.weight
    rest = (ones, ones) if name == "linear_policy_loss" else ()
    with torch.set_grad_enabled(which != "no grad"):
        out = getattr(ak, name)(hidden, weight, p.labels, *rest)
        total = out[0].sum()
    if which == "no grad":
        assert calls == []
        assert not total.requires_grad
        return
    total.backward()
    assert ("add_weight_grad_" in calls) == (which == "frozen hidden")
    assert ("hidden_grad_into" in calls) == (which == "frozen head")


def test_triton_features_that_have_failed_are_not_used():
    folder = Path(ak.__file__).parent
    for path in folder.glob("*_triton.py"):
        text = path.read_text()
        for feature in ("tl.dot", "autotune(", "warp_specialize", "make_tensor_descriptor", "make_block_ptr"):
            assert feature not in text, f"{path.name}: {feature}"


def sharded(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ids, labels = batch()
    ref = torch.tensor([-20.0, -10.0, -21.0, -8.0])

    def loss(model):
        out = model(input_ids=ids, labels=labels, fused="preference", ref_logps=ref, beta=0.5)
        return out.loss + model(input_ids=ids, labels=labels, fused="logprobs").logps.sum()

    plain = patch.patch_model(tiny_model())
    want_loss = loss(plain)
    want_loss.backward()
    model = patch.patch_model(tiny_model())
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(ValueError, match="DTensor"):
        ak.linear_logprobs(torch.zeros(3, 16), model.lm_head.weight, torch.arange(3))
    got = loss(model)
    torch.testing.assert_close(got, want_loss)
    got.backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            a.grad.full_tensor(), b.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_head_sharded_by_fsdp():
    """Liger 1048, CCE 31: a shard taken for the head. Inside the patched forward it is whole; outside it is refused."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(sharded, (folder,), nprocs=2)
