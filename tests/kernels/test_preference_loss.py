"""preference_loss over every kind, against formulas written out pair by pair in Python floats."""

from __future__ import annotations

import math

import advgame_kernels as ak
import pytest
import torch
from advgame_kernels import passes

BETA, TAU, GAMMA = 0.3, 0.05, 0.7


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return math.exp(log_sigmoid(x))


def direct(kind: str, c: float, r: float, rc: float, rr: float, nc: int, nr: int, *, eps: float, robust: bool) -> float:
    """The loss of one pair from its sums c, r, the reference's rc, rr and lengths; nothing shared with the library."""
    if kind in ("ipo_mean", "simpo", "orpo"):
        c, r, rc, rr = c / nc, r / nr, rc / nc, rr / nr
    if kind in ("simpo", "orpo", "cpo", "sft"):
        rc = rr = 0.0
    u, v = c - rc, r - rr
    h = u - v
    if kind == "sigmoid":
        a, b = log_sigmoid(BETA * h), log_sigmoid(-BETA * h)
        return (-(1 - eps) * a + eps * b) / (1 - 2 * eps) if robust else -(1 - eps) * a - eps * b
    if kind == "cpo":
        return -(1 - eps) * log_sigmoid(BETA * h) - eps * log_sigmoid(-BETA * h)
    if kind == "simpo":
        x = BETA * h - GAMMA
        return -(1 - eps) * log_sigmoid(x) - eps * log_sigmoid(-x)
    if kind in ("ipo", "ipo_mean"):
        return (h - 1 / (2 * BETA)) ** 2
    if kind == "hinge":
        return max(0.0, 1 - BETA * h)
    if kind == "exo_pair":
        p = sigmoid(BETA * h)
        return p * (math.log(p) - math.log(1 - eps)) + (1 - p) * (math.log(1 - p) - math.log(eps))
    if kind == "nca_pair":
        return -log_sigmoid(BETA * u) - 0.5 * log_sigmoid(-BETA * u) - 0.5 * log_sigmoid(-BETA * v)
    if kind == "bco_pair":
        return -log_sigmoid(BETA * u) - log_sigmoid(-BETA * v)
    if kind == "sppo_hard":
        return (u - 0.5 / BETA) ** 2 + (v + 0.5 / BETA) ** 2
    if kind == "apo_zero":
        return 1 - sigmoid(BETA * u) + sigmoid(BETA * v)
    if kind == "apo_down":
        return sigmoid(BETA * u) + 1 - sigmoid(BETA * h)
    if kind == "discopop":
        x = BETA * h
        w = sigmoid(x / TAU)
        return -log_sigmoid(x) * (1 - w) + math.exp(-x) * w
    if kind == "orpo":
        odds = math.log(math.exp(c) / (1 - math.exp(c))) - math.log(math.exp(r) / (1 - math.exp(r)))
        return -BETA * log_sigmoid(odds)
    assert kind == "sft"
    return -c / nc


def batch(pairs: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 20, (2 * pairs,), generator=g)
    logps = -torch.rand(2 * pairs, generator=g, dtype=torch.float64) * 3 * lengths - 0.1
    return logps, logps + torch.randn(2 * pairs, generator=g, dtype=torch.float64), lengths


GRID = [(k, 0.2 if k == "exo_pair" else 0.0, False) for k in ak.KINDS]
GRID += [("sigmoid", 0.1, False), ("sigmoid", 0.1, True), ("simpo", 0.1, False), ("cpo", 0.1, False)]


def settings(kind: str, eps: float, robust: bool) -> dict:
    return {
        "kind": kind, "beta": BETA, "label_smoothing": eps, "robust": robust, "simpo_gamma": GAMMA, "discopop_tau": TAU,
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "eps", "robust"), GRID)
def test_every_kind_matches_its_formula_and_gradcheck(kind, eps, robust):
    logps, ref, lengths = batch()
    out = ak.preference_loss(logps, ref, lengths=lengths, **settings(kind, eps, robust))
    for p in range(6):
        want = direct(
            kind, *logps[2 * p : 2 * p + 2].tolist(), *ref[2 * p : 2 * p + 2].tolist(),
            *lengths[2 * p : 2 * p + 2].tolist(), eps=eps, robust=robust,
        )  # fmt: skip
        assert out.losses[p].item() == pytest.approx(want, rel=1e-9, abs=1e-12)
    assert out.loss.item() == pytest.approx(out.losses.sum().item() / 6, rel=1e-12)
    logps.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ak.preference_loss(x, ref, lengths=lengths, **settings(kind, eps, robust)).loss, (logps,)
    )


@pytest.mark.parametrize(("kind", "eps", "robust"), GRID)
@pytest.mark.parametrize("gap", [-1e4, -300.0, 0.0, 300.0, 1e4])
def test_extreme_margins_stay_finite(kind, eps, robust, gap):
    logps = torch.tensor([-2e4 + gap, -2e4 if gap else 0.0], dtype=torch.float32, requires_grad=True)
    out = ak.preference_loss(
        logps, torch.tensor([-2e4, -2e4]), lengths=torch.tensor([4, 9]), **settings(kind, eps, robust)
    )
    (grad,) = torch.autograd.grad(out.loss, logps)
    assert torch.isfinite(grad).all()
    assert torch.isfinite(out.loss)


def test_metrics():
    logps, ref, lengths = batch()
    out = ak.preference_loss(logps, ref, beta=BETA)
    u, v = (logps - ref)[0::2], (logps - ref)[1::2]
    torch.testing.assert_close(out.margins, u - v)
    torch.testing.assert_close(out.chosen_rewards, BETA * u)
    torch.testing.assert_close(out.rejected_rewards, BETA * v)
    assert torch.equal(out.accuracies, (u > v).double())
    assert torch.equal(out.logps, logps)
    assert out.entropy is None
    mean = ak.preference_loss(logps, ref, beta=BETA, average=True, lengths=lengths)
    torch.testing.assert_close(mean.logps, logps / lengths)
    torch.testing.assert_close(mean.margins, (u / lengths[0::2]) - (v / lengths[1::2]))


def test_nll_term_and_normalizer():
    logps, ref, lengths = batch()
    plain = ak.preference_loss(logps, ref, beta=BETA, normalizer=10)
    both = ak.preference_loss(logps, ref, beta=BETA, normalizer=torch.tensor(10.0), nll_weight=0.5, lengths=lengths)
    nll = -(logps[0::2] / lengths[0::2]).sum()
    torch.testing.assert_close(both.loss, plain.loss + 0.5 * nll / 10)
    torch.testing.assert_close(plain.loss, plain.losses.sum() / 10)


@pytest.mark.skipif(passes.triton_reason() is not None, reason="no Triton")
@pytest.mark.parametrize("extras", [{"kind": "ipo"}, {"kind": "orpo", "nll_weight": 1.0}, {"kind": "sft"}])
def test_triton_form_matches_torch(extras):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logps, ref, lengths = (x.to(device) for x in batch())
    logps = logps.requires_grad_()
    ref = torch.stack([ref, ref + 9.0], dim=1)[:, 0]  # strided, as a column of a table of references is
    out, want = (
        ak.preference_loss(logps, ref, lengths=lengths, normalizer=7, impl=impl, **extras)
        for impl in ("triton", "torch")
    )
    for a, b in zip(out, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(torch.autograd.grad(2 * out.loss, logps), torch.autograd.grad(2 * want.loss, logps), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_gradient_scales_with_upstream():
    logps, ref, _ = batch()
    logps.requires_grad_()
    one = torch.autograd.grad(ak.preference_loss(logps, ref).loss, logps)[0]
    three = torch.autograd.grad(ak.preference_loss(logps, ref).loss * 3, logps)[0]
    torch.testing.assert_close(three, 3 * one)


def test_float32_inputs_give_float32_with_float64_inside():
    # Sums of -20000 that differ by 1/512: float32 holds the inputs exactly, so the margin must be exact too.
    logps = torch.tensor([-20000.0, -20000.001953125])
    out = ak.preference_loss(logps, torch.zeros(2))
    assert out.margins.item() == 0.001953125
    assert out.loss.dtype == torch.float32


@pytest.mark.parametrize("normalizer", [0, 4, torch.tensor(0.0)])
def test_no_pairs_is_a_zero_loss_with_a_gradient(normalizer):
    logps = torch.zeros(0, requires_grad=True)
    out = ak.preference_loss(logps, torch.zeros(0), normalizer=normalizer)
    assert out.loss.item() == 0.0
    out.loss.backward()
    assert logps.grad.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy_logps": torch.zeros(3)}, "policy_logps: expected an even number"),
        ({"policy_logps": torch.zeros(4, dtype=torch.int64)}, "policy_logps"),
        ({"ref_logps": torch.zeros(2)}, "ref_logps"),
        ({"ref_logps": None}, "ref_logps"),
        ({"ref_logps": torch.zeros(4, requires_grad=True)}, "ref_logps"),
        ({"kind": "kto"}, "kind: expected one of sigmoid"),
        ({"kind": "exo_pair"}, "label_smoothing"),
        ({"kind": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
        ({"label_smoothing": 0.7}, "label_smoothing"),
        ({"robust": True, "label_smoothing": 0.5}, "robust"),
        ({"kind": "ipo", "robust": True}, "robust"),
        ({"beta": 0.0}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"average": True}, "lengths"),
        ({"kind": "simpo"}, "lengths"),
        ({"nll_weight": 1.0}, "lengths"),
        ({"lengths": torch.ones(3)}, "lengths"),
        ({"normalizer": 0}, "normalizer"),
        ({"normalizer": torch.ones(2)}, "normalizer"),
        ({"discopop_tau": -1.0}, "discopop_tau"),
    ],
)
def test_refusals_name_the_argument(change, message):
    call = {"policy_logps": torch.zeros(4), "ref_logps": torch.zeros(4)} | change
    with pytest.raises(ValueError, match=message):
        ak.preference_loss(call.pop("policy_logps"), call.pop("ref_logps"), **call)
