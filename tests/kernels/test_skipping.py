"""Dropped vocabulary blocks stay within the stated bound, and nothing is dropped unasked."""

from __future__ import annotations

import advgame_kernels as ak
import pytest
import torch
from advgame_kernels import skipping
from problems import grads_of

ROWS, VOCAB, WIDTH = 24, 4000, 16
LENGTHS = [5, 7, 8, 4]


def problem(dtype=torch.float64):
    """A peaked model: only ids below 600 and the last ones are ever likely."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (torch.randn(VOCAB, WIDTH, generator=g, dtype=torch.float64) * 0.3).to(dtype).requires_grad_()
    bias = torch.full((VOCAB,), -14.0, dtype=torch.float64)
    bias[:600] = 0.0
    labels = torch.randint(0, 600, (ROWS,), generator=g)
    labels[5] = VOCAB - 1
    return hidden, weight, bias.to(dtype), labels


def gradients(skip_below, dtype=torch.float64, kind="sigmoid"):
    hidden, weight, bias, labels = problem(dtype)
    out = ak.linear_preference_loss(
        hidden, weight, labels, [0, 5, 12, 20, 24], torch.full((4,), -50.0), bias=bias, kind=kind,
        skip_below=skip_below, chunk_bytes=14 * VOCAB * 8,
    )  # fmt: skip
    return grads_of(out.loss, hidden, weight)


def test_runs_keep_what_exceeds_the_bound_and_only_that():
    dlogits = torch.zeros(3, 5 * skipping.WIDTH + 7)
    factors = torch.tensor([1.0, -10.0, 0.0])
    dlogits[0, 3] = 0.011
    dlogits[1, skipping.WIDTH + 1] = 0.09  # below 1 % of its row's factor, though above that of the first
    dlogits[0, 2 * skipping.WIDTH] = -0.02
    dlogits[0, 3 * skipping.WIDTH - 1] = 0.02
    dlogits[1, -1] = 0.2
    runs = skipping.kept_runs(dlogits, factors, 0.01)
    w = skipping.WIDTH
    assert runs == [slice(0, w), slice(2 * w, 3 * w), slice(5 * w, 5 * w + 7)]
    dropped = torch.ones(dlogits.shape[1], dtype=torch.bool)
    for run in runs:
        dropped[run] = False
    assert (dlogits[:, dropped].abs() <= 0.01 * factors.abs()[:, None]).all()


def test_a_row_without_factor_drops_out_and_one_with_a_gradient_does_not():
    dlogits = torch.zeros(2, 2 * skipping.WIDTH)
    dlogits[0, 0] = 1e-3  # an entropy term alone pulls here: the factor of the log-prob is zero
    runs = skipping.kept_runs(dlogits, torch.zeros(2), 0.5)
    assert runs == [slice(0, skipping.WIDTH)]


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_gradients_stay_within_the_bound(kind):
    threshold = 2.0**-9
    (full_h, full_w), (skip_h, skip_w) = gradients(0.0, kind=kind), gradients(threshold, kind=kind)
    hidden, weight, bias, labels = (x.detach() for x in problem())
    tokens = torch.log_softmax(hidden @ weight.t() + bias, dim=1).gather(1, labels[:, None])[:, 0]
    sums = torch.stack([x.sum() for x in tokens.split(LENGTHS)]).requires_grad_()
    (factors,) = grads_of(ak.preference_loss(sums, torch.full((4,), -50.0), kind=kind).loss, sums)
    allowed = threshold * factors.abs().repeat_interleave(torch.tensor(LENGTHS))[:, None]
    assert ((skip_w - full_w).abs() <= (allowed * hidden.abs()).sum(dim=0) + 1e-12).all()
    assert ((skip_h - full_h).abs() <= allowed * weight.abs().sum(dim=0) + 1e-12).all()
    changed = (skip_w != full_w).any(dim=1)
    assert changed[1024:].any()  # blocks of unlikely ids were dropped
    assert not changed[:512].any()  # those of likely ids were not
    assert (skip_h - full_h).norm() <= 2e-3 * full_h.norm()


def test_off_by_default_and_zero_threshold_changes_nothing():
    hidden, weight, bias, labels = problem()
    plain = ak.linear_preference_loss(
        hidden, weight, labels, [0, 5, 12, 20, 24], torch.full((4,), -50.0), bias=bias, chunk_bytes=14 * VOCAB * 8
    )
    for a, b in zip(grads_of(plain.loss, hidden, weight), gradients(0.0), strict=True):
        assert torch.equal(a, b)
    # A threshold below every gradient keeps every block: the same sums, in one run.
    for a, b in zip(gradients(1e-300), gradients(0.0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_bfloat16_and_policy_loss():
    for a, b in zip(gradients(2.0**-9, torch.bfloat16), gradients(0.0, torch.bfloat16), strict=True):
        assert (a.double() - b.double()).norm() <= 1e-2 * b.double().norm()
    hidden, weight, bias, labels = problem()
    ones = torch.ones(ROWS, dtype=torch.float64)
    found = [
        grads_of(
            ak.linear_policy_loss(hidden, weight, labels, ones, ones, bias=bias, skip_below=s).loss, hidden, weight
        )
        for s in (0.0, 2.0**-9)
    ]
    assert not torch.equal(found[0][1], found[1][1])
    assert (found[0][0] - found[1][0]).norm() <= 2e-3 * found[0][0].norm()
    with pytest.raises(ValueError, match="skip_below"):
        gradients(-1.0)
