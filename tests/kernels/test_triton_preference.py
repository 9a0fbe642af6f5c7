"""The one-launch pair kernel against the torch formulas and their autograd, for every kind."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from advgame_kernels import preference_triton
from advgame_kernels.preference import sequence_terms
from advgame_kernels.preference_kinds import PreferenceSpec
from test_preference_loss import GRID
from test_preference_loss import settings as kind_settings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [5, 3, 0, 1, 20, 17]
FIRST = 100  # the chunk does not start at the batch's first row


def check(spec: PreferenceSpec, spread: float) -> None:
    g = torch.Generator().manual_seed(0)
    rows = sum(LENGTHS)
    logps = (-torch.rand(rows, generator=g, dtype=torch.float64) * spread - 0.01).to(DEVICE)
    entropy = torch.rand(rows, generator=g, dtype=torch.float64).to(DEVICE)
    counts = torch.tensor(LENGTHS, device=DEVICE)
    bounds = FIRST + torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], device=DEVICE)
    sums = torch.stack([x.sum() for x in logps.split(LENGTHS)])
    ref = sums + torch.randn(len(LENGTHS), generator=g, dtype=torch.float64).to(DEVICE) * spread
    if not spec.needs_reference:
        ref = None
    scale = torch.tensor([0.125], dtype=torch.float64, device=DEVICE)
    got = preference_triton.pair_terms(logps, entropy, bounds, counts, ref, scale, FIRST, spec, True)

    sums.requires_grad_()
    want = sequence_terms(sums, ref, counts, spec)
    means = torch.stack([x.sum() for x in entropy.split(LENGTHS)]) / counts.clamp(min=1)
    (factor,) = torch.autograd.grad(want.total * 0.125, sums)
    close = {"rtol": 2e-6, "atol": 2e-7}  # settings travel as float32
    torch.testing.assert_close(got.terms[:, 0], want.losses.detach(), **close)
    torch.testing.assert_close(got.terms[:, 1].sum(), want.total.detach(), **close)
    torch.testing.assert_close(got.terms[:, 2:4].flatten(), want.logps.detach())
    torch.testing.assert_close(got.terms[:, 4:6], want.logratios.detach())
    torch.testing.assert_close(got.terms[:, 6:8].flatten(), means)
    torch.testing.assert_close(got.d_logps, factor.repeat_interleave(counts), **close)
    if spec.entropy_weight:
        share = -0.5 * spec.entropy_weight * 0.125 / counts.clamp(min=1).double()
        torch.testing.assert_close(got.d_entropy, share.repeat_interleave(counts), **close)


@pytest.mark.parametrize(("kind", "eps", "robust"), GRID)
@pytest.mark.parametrize("spread", [0.5, 8.0, 300.0])
def test_every_kind(kind, eps, robust, spread):
    check(PreferenceSpec(**kind_settings(kind, eps, robust)), spread)


@pytest.mark.parametrize("kind", ["sigmoid", "sft", "cpo"])
def test_averages_nll_and_entropy(kind):
    check(PreferenceSpec(kind=kind, average=True, nll_weight=0.3, entropy_weight=0.2), 3.0)


def test_the_order_of_kinds_is_the_kernels():
    names = ["SIGMOID", "IPO", "IPO_MEAN", "HINGE", "EXO", "NCA", "BCO", "SPPO", "APO_ZERO", "APO_DOWN", "DISCOPOP",
             "SIMPO", "ORPO", "CPO", "SFT"]  # fmt: skip
    for name, kind in zip(names, preference_triton.KINDS, strict=True):
        assert kind.upper().startswith(name.split("_")[0])


def test_opcheck():
    counts = torch.tensor([2, 1], device=DEVICE)
    bounds = torch.tensor([0, 2, 3], device=DEVICE)
    scale = torch.ones(1, dtype=torch.float64, device=DEVICE)
    logps = -torch.ones(3, device=DEVICE)
    settings = [0.1, 0.0, 0.5, 0.05, -1e-6, 0.0, 0.0]
    for ref in (None, torch.zeros(2, device=DEVICE)):
        torch.library.opcheck(
            torch.ops.advgame_kernels.pair_terms,
            (logps, None, bounds, counts, ref, scale, 0, settings, 0, False, False, True),
        )
