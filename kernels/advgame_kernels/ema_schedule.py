"""Decay of a weight average by the number of its updates: constant, warmed up, or a power function of time.

All are pure functions of a count, so that a resumed run continues exactly where it was.
"""

from __future__ import annotations

from advgame_kernels._checks import one_of, refuse

SCHEDULES = ("constant", "warmup", "power")


def ema_decay(schedule: str, updates: int, *, decay: float = 0.95, gamma: float = 6.94) -> float:
    """Decay of update number `updates` (the first is 1), in [0, 1].

    constant: `decay`. warmup: `warmup_decay`. power: `power_decay`. ValueError for anything else.
    """
    one_of("schedule", schedule, SCHEDULES)
    if updates < 1:
        refuse("updates", "the number of this update, from 1 on", updates)
    if schedule == "warmup":
        return warmup_decay(updates, decay)
    return power_decay(updates, gamma) if schedule == "power" else decay


def warmup_decay(updates: int, decay: float) -> float:
    """min(decay, (1 + t) / (10 + t)): short averages first, so that early weights are soon forgotten.

    The form of TensorFlow's `ExponentialMovingAverage(num_updates=…)`.
    """
    return min(decay, (1 + updates) / (10 + updates))


def power_decay(updates: int, gamma: float) -> float:
    """(1 − 1/t)^(γ+1): weights t^γ on the past, a profile that stretches with training instead of a fixed length.

    Karras et al. 2024 (EDM2), section 3.1; γ = 6.94 has a relative standard deviation of 0.10, γ = 16.97 of 0.05.
    The first update takes the player as it is.
    """
    return (1.0 - 1.0 / updates) ** (gamma + 1.0)
