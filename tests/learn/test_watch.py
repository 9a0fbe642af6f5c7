"""Calls to ranks that die, and work beside them."""

import asyncio
import threading
import time

import pytest

from advgame.errors import InputError, RanksDied
from advgame.learn import watch as module
from advgame.learn.watch import Watch


def soon(call, *arguments):
    threading.Timer(0.05, call, arguments).start()


def test_a_call_returns_or_raises_what_the_death_was():
    watch = Watch()
    assert watch.unless_died(lambda: 7) == 7
    soon(watch.died, RanksDied("trainer rank 2 died"))
    began = time.monotonic()
    with pytest.raises(RanksDied, match=r"^trainer rank 2 died$"):
        watch.unless_died(lambda: threading.Event().wait(60))
    assert time.monotonic() - began < 5
    watch.died(RanksDied("trainer rank 1 died"))  # of the first one's death
    with pytest.raises(RanksDied, match="rank 2"):
        watch.unless_died(lambda: pytest.fail("nobody is left to be called"))


def test_a_connection_that_closes_before_the_news(monkeypatch):
    """What a rank lacks is the user's to mend, and comes as it was raised there; without news it is a death."""

    def closed():
        raise RuntimeError("Connection closed by peer")

    watch = Watch()
    soon(watch.died, InputError("defender.model: no such folder"))
    with pytest.raises(InputError, match="no such folder"):
        watch.unless_died(closed)
    monkeypatch.setattr(module, "TOLD_S", 0.1)
    with pytest.raises(RanksDied, match=r"a trainer rank does not answer \(Connection closed by peer\)"):
        Watch().unless_died(closed)


@pytest.mark.parametrize("before", [False, True])
def test_work_beside_the_ranks_ends_with_them(before):
    watch, ended = Watch(), []

    async def play():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def run():
        if before:
            watch.died(RanksDied("trainer rank 1 died"))
        else:
            soon(watch.died, RanksDied("trainer rank 1 died"))
        await watch.guard(play())

    with pytest.raises(RanksDied, match="trainer rank 1 died"):
        asyncio.run(run())
    assert ended == [True]


def test_work_that_nobody_dies_of():
    async def fails():
        raise ValueError("its own")

    async def run():
        assert await Watch().guard(asyncio.sleep(0, 3)) == 3
        with pytest.raises(ValueError, match="its own"):
            await Watch().guard(fails())

    asyncio.run(run())
