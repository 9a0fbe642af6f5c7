"""Busy and summed seconds, with a clock that is set by hand."""

from advgame.rollout.meter import Meter


def test_overlapping_uses():
    now = 0.0
    meter = Meter(lambda: now)
    now = 10.0
    first = meter.use()
    first.__enter__()
    now = 11.0
    second = meter.use()
    second.__enter__()
    now = 13.0
    first.__exit__(None, None, None)
    assert meter.take() == (3.0, 5.0)  # 1 alone, 2 together
    now = 14.0
    second.__exit__(None, None, None)
    now = 20.0
    assert meter.take() == (1.0, 1.0)
    assert meter.take() == (0.0, 0.0)
