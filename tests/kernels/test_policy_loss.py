"""policy_loss and linear_policy_loss against formulas written out token by token, and against each other."""

from __future__ import annotations

import math

import advgame_kernels as ak
import pytest
import torch
from advgame_kernels import passes
from problems import grads_of, head_problem

N = 18
ROW = 37 * 8


def tokens(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    logps = -torch.rand(N, generator=g, dtype=torch.float64) * 4
    near = [logps + 0.5 * torch.randn(N, generator=g, dtype=torch.float64) for _ in range(3)]
    weights = torch.rand(N, generator=g, dtype=torch.float64)
    weights[::5] = 0
    advantages = torch.randn(N, generator=g, dtype=torch.float64)
    return {
        "logps": logps,
        "advantages": advantages,
        "weights": weights,
        "ref": near[0],
        "old": near[1],
        "sampler": near[2],
    }


def direct(t, i, *, ref, old, sampler, kl_beta, clip, truncation) -> float:
    logp, adv = t["logps"][i].item(), t["advantages"][i].item()
    ratio = math.exp(logp - t["old"][i].item()) if old else 1.0
    objective = ratio * adv
    if clip is not None:
        low, high = clip if isinstance(clip, tuple) else (clip, clip)
        objective = min(objective, min(max(ratio, 1 - low), 1 + high) * adv)
    if sampler:
        weight = math.exp((t["old"][i].item() if old else logp) - t["sampler"][i].item())
        objective *= weight if truncation is None else min(weight, truncation)
    kl = 0.0
    if ref:
        d = t["ref"][i].item() - logp
        kl = math.exp(d) - d - 1
    return t["weights"][i].item() * (-objective + kl_beta * kl)


GRID = [
    {"ref": False, "old": False, "sampler": False, "kl_beta": 0.0, "clip": None, "truncation": None},
    {"ref": True, "old": False, "sampler": False, "kl_beta": 0.1, "clip": None, "truncation": None},
    {"ref": True, "old": False, "sampler": True, "kl_beta": 0.1, "clip": None, "truncation": 2.0},
    {"ref": False, "old": True, "sampler": False, "kl_beta": 0.0, "clip": 0.2, "truncation": None},
    {"ref": False, "old": True, "sampler": False, "kl_beta": 0.0, "clip": None, "truncation": None},
    {"ref": True, "old": True, "sampler": True, "kl_beta": 0.3, "clip": (0.2, 0.28), "truncation": 1.1},
    {"ref": False, "old": False, "sampler": True, "kl_beta": 0.0, "clip": None, "truncation": None},
]


def keywords(t, case):
    return {
        "ref_logps": t["ref"] if case["ref"] else None,
        "old_logps": t["old"] if case["old"] else None,
        "sampler_logps": t["sampler"] if case["sampler"] else None,
        "kl_beta": case["kl_beta"], "clip": case["clip"], "truncation": case["truncation"],
    }  # fmt: skip


NEEDS_TRITON = pytest.mark.skipif(passes.triton_reason() is not None, reason="no Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@NEEDS_TRITON
@pytest.mark.parametrize("case", GRID)
def test_triton_form_matches_torch(case):
    t = {k: v.to(DEVICE) for k, v in tokens().items()}
    t["ref"][::5] = float("nan")  # where the weight is zero
    t["logps"].requires_grad_()
    args = (t["logps"], t["advantages"], t["weights"])
    out, want = (ak.policy_loss(*args, **keywords(t, case), impl=impl) for impl in ("triton", "torch"))
    live = t["weights"] != 0
    for name, a, b in zip(out._fields, out, want, strict=True):
        if name in ("kl", "ratio"):
            a, b = a[live], b[live]
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    got = grads_of(3 * out.loss, t["logps"])[0]
    torch.testing.assert_close(got, grads_of(3 * want.loss, t["logps"])[0], rtol=1e-6, atol=1e-6)


@NEEDS_TRITON
@pytest.mark.parametrize("case", [GRID[2], GRID[5]])
def test_linear_form_on_triton(case):
    p = head_problem([5, 3, 9, 1]).to(torch.float32)
    t = {k: v.float().to(DEVICE) for k, v in tokens().items()}
    hidden, weight = (x.detach().to(DEVICE).requires_grad_() for x in (p.hidden, p.weight))
    args = (hidden, weight, p.labels.to(DEVICE), t["advantages"], t["weights"])
    out = ak.linear_policy_loss(*args, **keywords(t, case), entropy_weight=0.1, chunk_bytes=7 * 37 * 4, impl="triton")
    want = ak.linear_policy_loss_ref(*args, **keywords(t, case), entropy_weight=0.1)
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads_of(out.loss, hidden, weight), grads_of(want.loss, hidden, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", GRID)
def test_value_matches_the_formula(case):
    t = tokens()
    out = ak.policy_loss(t["logps"], t["advantages"], t["weights"], **keywords(t, case))
    assert out.loss.item() == pytest.approx(sum(direct(t, i, **case) for i in range(N)), rel=1e-12)


def test_on_policy_gradient_is_the_advantage():
    t = tokens()
    t["logps"].requires_grad_()
    (grad,) = grads_of(ak.policy_loss(t["logps"], t["advantages"], t["weights"]).loss, t["logps"])
    torch.testing.assert_close(grad, -t["weights"] * t["advantages"])


def test_importance_weight_is_detached_and_truncated():
    t = tokens()
    t["logps"].requires_grad_()
    out = ak.policy_loss(t["logps"], t["advantages"], t["weights"], sampler_logps=t["sampler"], truncation=1.2)
    raw = (t["logps"] - t["sampler"]).exp().detach()
    (grad,) = grads_of(out.loss, t["logps"])
    torch.testing.assert_close(grad, -t["weights"] * t["advantages"] * raw.clamp(max=1.2))
    live = t["weights"] != 0
    assert out.clip_fraction.item() == pytest.approx((raw[live] > 1.2).double().mean().item())
    torch.testing.assert_close(out.ratio[live], raw[live])


def test_ppo_gradcheck_away_from_the_kinks():
    t = tokens()
    t["logps"].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: (
            ak.policy_loss(
                x, t["advantages"], t["weights"], ref_logps=t["ref"], old_logps=t["old"], kl_beta=0.2, clip=0.2
            ).loss
        ),
        (t["logps"],),
    )


@pytest.mark.parametrize("case", GRID)
@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("extras", [{}, {"softcap": 3.0, "temperature": 0.7, "entropy_weight": 0.2, "bias": True}])
def test_linear_form_matches_whole_logits(case, rows, extras):
    p, t = head_problem([5, 3, 9, 1]), tokens()
    if "bias" in extras:
        extras = extras | {"bias": p.bias}
    leaves = [p.hidden, p.weight] + ([p.bias] if "bias" in extras else [])
    args = (p.hidden, p.weight, p.labels, t["advantages"], t["weights"])
    out = ak.linear_policy_loss(*args, chunk_bytes=rows * ROW, **keywords(t, case), **extras)
    want = ak.linear_policy_loss_ref(*args, **keywords(t, case), **extras)
    for a, b in zip(out, want, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(grads_of(1.3 * out.loss, *leaves), grads_of(1.3 * want.loss, *leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_linear_gradcheck():
    p, t = head_problem([3, 2], vocab=7, width=3), tokens()
    cut = {k: v[:5] for k, v in t.items()}
    # sg() makes the plain objective's finite difference zero; with old_logps the ratio moves and can be checked.
    assert torch.autograd.gradcheck(
        lambda h, w: ak.linear_policy_loss(
            h, w, p.labels, cut["advantages"], cut["weights"], ref_logps=cut["ref"], old_logps=cut["old"], kl_beta=0.1,
            entropy_weight=0.2, chunk_bytes=2 * 7 * 8,
        ).loss,
        (p.hidden, p.weight),
    )  # fmt: skip


def test_masked_tokens_may_hold_anything():
    t = tokens()
    dead = t["weights"] == 0
    for name, junk in (("ref", 1e4), ("old", -1e4), ("sampler", float("nan")), ("advantages", float("inf"))):
        t[name] = torch.where(dead, junk, t[name])
    t["logps"].requires_grad_()
    case = GRID[5]
    out = ak.policy_loss(t["logps"], t["advantages"], t["weights"], **keywords(t, case))
    (grad,) = grads_of(out.loss, t["logps"])
    assert torch.isfinite(out.loss)
    assert torch.isfinite(grad).all()
    assert (grad[dead] == 0).all()


def test_all_tokens_masked_and_no_tokens():
    t = tokens()
    p = head_problem([5, 3, 9, 1])
    none = torch.zeros(N, dtype=torch.float64)
    out = ak.linear_policy_loss(p.hidden, p.weight, p.labels, t["advantages"], none, kl_beta=0.1, ref_logps=t["ref"])
    assert out.loss.item() == 0.0
    assert not any(g.any() for g in grads_of(out.loss, p.hidden, p.weight))
    empty = head_problem([])
    zero = torch.zeros(0, dtype=torch.float64)
    out = ak.linear_policy_loss(empty.hidden, empty.weight, empty.labels, zero, zero)
    assert out.loss.item() == 0.0
    assert not grads_of(out.loss, empty.weight)[0].any()
    logps = torch.zeros(0, requires_grad=True)
    ak.policy_loss(logps, torch.zeros(0), torch.zeros(0)).loss.backward()
    assert logps.grad.shape == (0,)


def test_float32_and_bfloat16_heads():
    for dtype in (torch.float32, torch.bfloat16):
        narrow, t = head_problem([5, 3, 9, 1]).to(dtype), {k: v.float() for k, v in tokens().items()}
        exact = narrow.to(torch.float64)
        args = (narrow.labels, t["advantages"], t["weights"])
        out = ak.linear_policy_loss(narrow.hidden, narrow.weight, *args, ref_logps=t["ref"], kl_beta=0.1)
        want = ak.linear_policy_loss_ref(
            exact.hidden,
            exact.weight,
            *args[:1],
            *(x.double() for x in args[1:]),
            ref_logps=t["ref"].double(),
            kl_beta=0.1,
        )
        torch.testing.assert_close(out.loss.double(), want.loss, rtol=1e-5, atol=1e-5)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for a, b in zip(
            grads_of(out.loss, narrow.hidden, narrow.weight),
            grads_of(want.loss, exact.hidden, exact.weight),
            strict=True,
        ):
            assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantages": torch.zeros(3)}, "advantages"),
        ({"weights": torch.zeros(4, dtype=torch.int64)}, "weights"),
        ({"ref_logps": torch.zeros(5)}, "ref_logps"),
        ({"kl_beta": 0.1}, "ref_logps"),
        ({"kl_beta": -0.1}, "kl_beta"),
        ({"clip": -0.2}, "clip"),
        ({"truncation": 2.0}, "truncation"),
        ({"truncation": 0.0, "sampler_logps": torch.zeros(4)}, "truncation"),
    ],
)
def test_refusals_name_the_argument(change, message):
    call = {"logps": torch.zeros(4), "advantages": torch.zeros(4), "weights": torch.zeros(4)} | change
    with pytest.raises(ValueError, match=message):
        ak.policy_loss(**call)
