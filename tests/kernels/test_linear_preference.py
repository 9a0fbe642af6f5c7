"""linear_preference_loss against whole logits, preference_loss and autograd in float64."""

from __future__ import annotations

import advgame_kernels as ak
import pytest
import torch
from advgame_kernels.linear_preference import plan_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import grads_of, head_problem
from test_preference_loss import GRID
from test_preference_loss import settings as kind_settings

LENGTHS = [5, 3, 9, 1, 2, 2, 12, 7]
ROW = 37 * 8  # bytes of one float64 row of logits


def call(fn, p, **kw):
    return fn(p.hidden, p.weight, p.labels, p.bounds, p.ref_logps, **kw)


def check_against_reference(p, **kw):
    out = call(ak.linear_preference_loss, p, **kw)
    want = call(ak.linear_preference_loss_ref, p, **kw)
    for name, a, b in zip(out._fields, out, want, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
    leaves = [p.hidden, p.weight] + ([p.bias] if "bias" in kw else [])
    for a, b in zip(grads_of(out.loss * 1.7, *leaves), grads_of(want.loss * 1.7, *leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("kind", "eps", "robust"), GRID)
def test_every_kind_over_chunks(kind, eps, robust):
    # 14 rows: pairs of 8, 10 and 4 rows share or fill chunks, the pair of 19 rows is split and recomputed.
    check_against_reference(head_problem(LENGTHS), chunk_bytes=14 * ROW, **kind_settings(kind, eps, robust))


@pytest.mark.parametrize("rows", [1, 4, 19, 1000])
@pytest.mark.parametrize(
    "extras",
    [
        {"average": True},
        {"nll_weight": 0.3, "normalizer": 11},
        {"entropy_weight": 0.2, "normalizer": torch.tensor(5.0)},
        {"softcap": 4.0, "temperature": 0.6, "nll_weight": 0.2, "entropy_weight": 0.1},
    ],
)
def test_terms_and_chunk_sizes(rows, extras):
    p = head_problem(LENGTHS)
    check_against_reference(p, chunk_bytes=rows * ROW, bias=p.bias, **extras)


def test_gradcheck():
    p = head_problem([3, 2, 1, 4], vocab=7, width=3)
    assert torch.autograd.gradcheck(
        lambda h, w, b: ak.linear_preference_loss(
            h, w, p.labels, p.bounds, p.ref_logps, bias=b, kind="ipo", softcap=3.0, temperature=0.8, nll_weight=0.1,
            entropy_weight=0.2, chunk_bytes=6 * 7 * 8,
        ).loss,
        (p.hidden, p.weight, p.bias),
    )  # fmt: skip


def test_equals_preference_loss_on_the_sums():
    p = head_problem(LENGTHS)
    out = call(ak.linear_preference_loss, p, kind="ipo")
    direct = ak.preference_loss(out.logps, p.ref_logps, kind="ipo")
    torch.testing.assert_close(out.losses, direct.losses)
    torch.testing.assert_close(out.margins, direct.margins)


def test_reference_free_kinds_need_no_reference():
    p = head_problem(LENGTHS)
    out = ak.linear_preference_loss(p.hidden, p.weight, p.labels, p.bounds, None, kind="simpo")
    assert torch.isfinite(out.loss)
    with pytest.raises(ValueError, match="ref_logps"):
        ak.linear_preference_loss(p.hidden, p.weight, p.labels, p.bounds, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_stay_within_twice_the_eager_error(dtype):
    narrow = head_problem([40, 23, 31, 55], vocab=501, width=32).to(dtype)
    exact = narrow.to(torch.float64)
    want, eager = call(ak.linear_preference_loss_ref, exact), call(ak.linear_preference_loss_ref, narrow)
    out = call(ak.linear_preference_loss, narrow, chunk_bytes=70 * 501 * 4)
    assert (out.margins - want.margins).abs().max() <= 2 * (eager.margins - want.margins).abs().max() + 1e-5
    got, low = grads_of(out.loss, narrow.hidden, narrow.weight), grads_of(eager.loss, narrow.hidden, narrow.weight)
    high = grads_of(want.loss, exact.hidden, exact.weight)
    for a, b, c in zip(got, low, high, strict=True):
        assert a.dtype == dtype
        assert (a.double() - c).norm() <= 2 * (b.double() - c).norm() + 1e-6


def test_weight_gradient_accumulates_in_float32_over_chunks():
    # 512 pairs push equal shares into one weight row: a bf16 accumulator stops growing at 256 shares.
    pairs, vocab, width = 512, 4, 2
    hidden = torch.ones(2 * pairs, width, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(vocab, width, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.tensor([0, 1] * pairs)
    bounds = list(range(2 * pairs + 1))
    out = ak.linear_preference_loss(
        hidden, weight, labels, bounds, torch.zeros(2 * pairs), beta=1.0, normalizer=1, chunk_bytes=2 * vocab * 4
    )
    (grad,) = grads_of(out.loss, weight)
    torch.testing.assert_close(grad[0].float(), torch.full((width,), -0.5 * pairs), rtol=1e-2, atol=0)


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_float32_master_weight_beside_bfloat16_hidden_states(impl):
    master = head_problem([40, 23, 31, 55], vocab=501, width=32).to(torch.float32)
    weight = master.weight.detach().bfloat16().float().requires_grad_()  # exactly representable: one weight, two dtypes
    hidden = master.hidden.detach().bfloat16().requires_grad_()
    args = (master.labels, master.bounds, master.ref_logps)
    settings = {"chunk_bytes": 70 * 501 * 4, "impl": impl}
    mixed = ak.linear_preference_loss(hidden, weight, *args, **settings)
    narrow_weight = weight.detach().bfloat16().requires_grad_()
    narrow = ak.linear_preference_loss(hidden, narrow_weight, *args, **settings)
    assert torch.equal(mixed.margins, narrow.margins)
    got, low = grads_of(mixed.loss, hidden, weight), grads_of(narrow.loss, hidden, narrow_weight)
    assert torch.equal(got[0], low[0])
    assert got[1].dtype == torch.float32
    assert torch.equal(got[1].bfloat16(), low[1])
    assert not torch.equal(got[1].bfloat16().float(), got[1])
    tokens = ak.linear_logprobs(hidden, weight, master.labels, **settings)
    assert grads_of(tokens.logps.sum(), weight)[0].dtype == torch.float32


def test_tied_weights_add_up():
    p = head_problem([4, 3, 2, 5])
    found = []
    for fn in (ak.linear_preference_loss, ak.linear_preference_loss_ref):
        hidden = torch.nn.functional.embedding(torch.arange(14) % 37, p.weight) * 0.5
        found += grads_of(fn(hidden, p.weight, p.labels, p.bounds, p.ref_logps).loss, p.weight)
    torch.testing.assert_close(found[0], found[1])


def test_retained_graph_used_twice():
    p = head_problem(LENGTHS)
    loss = call(ak.linear_preference_loss, p).loss
    first = torch.autograd.grad(loss, (p.hidden, p.weight), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (p.hidden, p.weight))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b)


@pytest.mark.parametrize("which", ["frozen head", "frozen hidden", "no grad"])
def test_nothing_unasked_is_computed(which, monkeypatch):
    from advgame_kernels import gemm, passes

    calls = []
    for module, name in ((gemm, "hidden_grad_into"), (gemm, "add_weight_grad_"), (passes, "row_grads_")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, real=real, **k: calls.append(name) or real(*a, **k))
    p = head_problem(LENGTHS)
    hidden = p.hidden.detach() if which == "frozen hidden" else p.hidden
    weight = p.weight.detach() if which == "frozen head" else p.weight
    with torch.set_grad_enabled(which != "no grad"):
        out = ak.linear_preference_loss(hidden, weight, p.labels, p.bounds, p.ref_logps)
    if which == "no grad":
        assert calls == []
        assert not out.loss.requires_grad
    else:
        assert ("add_weight_grad_" in calls) == (which == "frozen hidden")
        assert ("hidden_grad_into" in calls) == (which == "frozen head")
        out.loss.backward()


def test_logits_are_computed_twice_only_for_the_pair_that_does_not_fit(monkeypatch):
    from advgame_kernels import gemm

    rows = []
    real = gemm.logits_into
    monkeypatch.setattr(gemm, "logits_into", lambda out, h, *a: rows.append(h.shape[0]) or real(out, h, *a))
    call(ak.linear_preference_loss, head_problem(LENGTHS), chunk_bytes=14 * ROW)
    assert sum(rows) == sum(LENGTHS) + 19
    assert max(rows) <= 14


def test_no_pairs_is_a_zero_loss_with_a_gradient():
    p = head_problem([])
    out = call(ak.linear_preference_loss, p, normalizer=8)
    assert out.loss.item() == 0.0
    grads = grads_of(out.loss, p.hidden, p.weight)
    assert grads[0].shape == (0, 8)
    assert not grads[1].any()


@pytest.mark.parametrize("lengths", [[0, 0], [3, 0], [0, 0, 2, 1], [1, 1]])
def test_empty_sequences(lengths):
    p = head_problem(lengths)
    for kind in ("sigmoid", "simpo", "orpo"):
        check_against_reference(p, kind=kind, nll_weight=0.5, entropy_weight=0.1)


@given(st.lists(st.integers(0, 9), max_size=12).map(lambda x: x[: len(x) // 2 * 2]), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_plan_covers_every_row_once_and_splits_no_pair(lengths, budget):
    bounds = [0]
    for n in lengths:
        bounds.append(bounds[-1] + n)
    chunks = list(plan_pairs(bounds, budget))
    assert [i for c in chunks for i in range(c.pairs.start, c.pairs.stop)] == list(range(len(lengths) // 2))
    assert [i for c in chunks for i in range(c.rows.start, c.rows.stop)] == list(range(bounds[-1]))
    for c in chunks:
        assert c.rows.stop - c.rows.start <= budget or c.pairs.stop - c.pairs.start == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": [0, 3, 4, 6]}, "cu_seqlens"),
        ({"cu_seqlens": [0, 3, 5]}, "cu_seqlens"),
        ({"cu_seqlens": [1, 3, 6]}, "cu_seqlens"),
        ({"cu_seqlens": [0, 7, 6]}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0.0, 3.0, 6.0])}, "cu_seqlens"),
        ({"cu_seqlens": torch.zeros(3, dtype=torch.int64, device="meta")}, "cu_seqlens: expected a list or a CPU"),
        ({"ref_logps": torch.zeros(3)}, "ref_logps"),
        ({"kind": "dpo"}, "kind"),
        ({"entropy_weight": float("nan")}, "entropy_weight"),
        ({"normalizer": -1}, "normalizer"),
        ({"labels": torch.full((6,), 5)}, "labels"),
    ],
)
def test_refusals_name_the_argument(change, message):
    args = {
        "hidden": torch.zeros(6, 2), "weight": torch.zeros(5, 2), "labels": torch.zeros(6, dtype=torch.int64),
        "cu_seqlens": [0, 3, 6], "ref_logps": torch.zeros(2),
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ak.linear_preference_loss(**args)


def test_a_gradient_changed_in_place_does_not_reach_a_second_pass():
    """With the graph kept, what the first pass returned is the caller's to change."""
    hidden, weight = torch.randn(8, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
    out = ak.linear_preference_loss(hidden, weight, torch.arange(8), [0, 3, 8], torch.zeros(2))
    first = torch.autograd.grad(out.loss, (hidden, weight), retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()
    second = torch.autograd.grad(out.loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(kept, second, strict=True))
