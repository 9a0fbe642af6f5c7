"""Decay schedules, and what a shadow makes of a player that moves in tiny steps."""

from __future__ import annotations

import advgame_kernels as ak
import pytest
import torch
from advgame_kernels import native

IMPLS = ["torch", pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="no extension"))]
STEPS = 10_000


def test_schedules_are_their_formulas():
    assert ak.ema_decay("constant", 7, decay=0.9) == 0.9
    assert [ak.ema_decay("warmup", t, decay=0.95) for t in (1, 10, 1000)] == [2 / 11, 11 / 20, 0.95]
    assert ak.power_decay(1, 6.94) == 0.0
    assert ak.power_decay(100, 6.94) == pytest.approx(0.99**7.94)


@pytest.mark.parametrize(("gamma", "deviation"), [(6.94, 0.10), (16.97, 0.05)])
def test_the_power_schedule_weighs_the_past_by_its_power(gamma, deviation):
    """The product of the decays is t^gamma; its spread over relative time is what EDM2 names the profiles by."""
    n = 4000
    decays = torch.tensor([ak.power_decay(t, gamma) for t in range(1, n + 1)], dtype=torch.float64)
    later = torch.cat([decays.flip(0).cumprod(0).flip(0)[1:], torch.ones(1, dtype=torch.float64)])
    weights, time = (1 - decays) * later, torch.arange(1, n + 1, dtype=torch.float64) / n
    assert weights.sum() == pytest.approx(1.0)
    want = time**gamma
    torch.testing.assert_close(weights, want / want.sum(), atol=5e-3 * float(weights.max()), rtol=0)
    mean = (weights * time).sum()
    assert float((weights * (time - mean) ** 2).sum().sqrt()) == pytest.approx(deviation, rel=0.02)


@pytest.mark.parametrize(("schedule", "updates"), [("cosine", 1), ("constant", 0)])
def test_refusals(schedule, updates):
    with pytest.raises(ValueError, match="schedule" if updates else "updates"):
        ak.ema_decay(schedule, updates)


def moving_player() -> torch.Tensor:
    return torch.tensor([1.0, -0.7, 3e-3, 0.0312, -12.5], dtype=torch.float32).repeat(16)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("decay", [0.95, 0.9999])
def test_a_float32_shadow_follows_steps_of_one_in_a_million(impl, decay):
    """10 000 steps of 1e-6 of each weight: within 1e-3 of a float64 average, relative to the weight."""
    player, shadow = moving_player(), [moving_player()]
    exact = shadow[0].double()
    for _ in range(STEPS):
        player *= 1 + 1e-6
        ak.ema_update_(shadow, [player], decay, impl=impl)
        exact += (1 - decay) * (player.double() - exact)
    moved = ((player - moving_player()) / moving_player()).abs()
    assert moved.min() > 5e-3, "the float32 player itself moves by about 1 %"
    assert ((shadow[0].double() - exact) / exact).abs().max() < 1e-3
    # and far closer than that: what is lost is a small part of the movement
    assert ((shadow[0].double() - exact) / exact).abs().max() < 0.02 * float(moved.min())


def test_a_bfloat16_shadow_rounded_to_nearest_never_moves_while_the_others_follow():
    """The same player. Nearest: not one bit in 10 000 steps. Stochastic and compensated rounding do follow."""
    player, start, decay = moving_player(), moving_player().bfloat16(), 0.95
    nearest, random, kept = start.clone(), [start.clone().repeat(64)], [start.clone()]
    compensation = [torch.zeros_like(start)]
    for step in range(STEPS):
        player *= 1 + 1e-6
        nearest.copy_(nearest.float() + (1 - decay) * (player - nearest.float()))
        ak.ema_update_(kept, [player], decay, compensation=compensation, impl="torch")
        if step >= STEPS - 400:  # 20 time constants are enough to forget where it began
            ak.ema_update_(random, [player.repeat(64)], decay, seed=step, impl="torch")
    assert torch.equal(nearest, start)
    lag = ((player.double() - kept[0].double() - compensation[0].double()) / player.double()).abs()
    assert lag.max() < 2e-4  # two bfloat16 numbers hold 16 bits
    mean = random[0].double().view(64, 16, 5).mean(dim=(0, 1))
    # 1024 copies of a weight, each off by at most an ulp (2^-7) at any time: 5 standard errors are 1.2e-3
    assert ((mean - player[:5].double()) / player[:5].double()).abs().max() < 1.2e-3


def test_stochastic_rounding_is_unbiased():
    """Mean error over 160 000 roundings of uniformly placed values: a z-test, two-sided, that a fair coin fails once
    in 1.7 million times (5 standard errors). Rounding to nearest of the same values is fair too, but each value of
    its own is not: there the error must vanish for every place between two neighbours."""
    from advgame_kernels.ema_bf16 import round_stochastically

    g = torch.Generator().manual_seed(11)
    places = torch.rand(16, 1, generator=g, dtype=torch.float64)
    exact = (1 + places * 2**-7).float().expand(16, 10_000).contiguous()
    error = round_stochastically(exact, g).double() - exact.double()
    spread = 2**-7 * (places * (1 - places)).sqrt().squeeze()
    z = error.mean(dim=1) / (spread / 10_000**0.5)
    assert z.abs().max() < 5
    assert abs(error.mean()) < 5 * 2**-7 * float((places * (1 - places)).mean().sqrt()) / 160_000**0.5


@pytest.mark.parametrize("impl", IMPLS)
def test_stochastic_updates_are_unbiased_for_every_weight_and_over_time(impl):
    """The whole update, 4096 weights at 16 places between two neighbours, 64 seeds in a row: z-tests at 5 standard
    errors of each place and of each seed, at 7 of each weight over the seeds; neighbours of either kind do not
    correlate."""
    n, seeds = 4096, 64
    places = (torch.arange(n, dtype=torch.float64) % 16 + 0.5) / 16
    player, errors = (1 + places * 2**-7).float(), []
    for seed in range(seeds):
        shadow = [torch.ones(n, dtype=torch.bfloat16)]
        ak.ema_update_(shadow, [player], 0.0, seed=seed, impl=impl)
        errors.append((shadow[0].double() - player.double()) / (2**-7 * (places * (1 - places)).sqrt()))
    scores = torch.stack(errors)  # each of mean 0 and variance 1
    assert (scores.view(seeds, -1, 16).mean(dim=(0, 1)).abs() * (seeds * n / 16) ** 0.5).max() < 5
    assert (scores.mean(dim=1).abs() * n**0.5).max() < 5
    assert (scores.mean(dim=0).abs() * seeds**0.5).max() < 7  # of 64 coins, some 1 in 32
    for one, other in ((scores[:, 1:], scores[:, :-1]), (scores[1:], scores[:-1])):
        assert abs(float((one * other).mean())) * (seeds * n) ** 0.5 < 5
