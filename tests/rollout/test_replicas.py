"""Replicas of one model: who is asked, what moves when one dies, hangs or fails a publish, and which weights serve."""

import asyncio
import os
import signal
import time
from collections import Counter
from contextlib import suppress

import engines
import pytest

from advgame.game.tree import Sample
from advgame.publish.channels import ShmChannel
from advgame.publish.plan import sources_of
from advgame.rollout.channel import PublishFailed, PublishTimes
from advgame.rollout.engine import EngineDied, EngineUnwell
from advgame.rollout.replicas import ReplicaEngine
from advgame.rollout.slowness import Slowness
from advgame.rollout.vllm_process import launch_threaded
from advgame.run.effort import Replicas

PROMPTS = [(3, 9, 10), (3, 9, 10, 11, 12, 13), (3, 14)]


class Scripted:
    """A replica whose fate the test decides; `weights` is what was written into it last."""

    def __init__(self, number, counters, average, restarts=3):
        self.name, self.folder, self.counters, self.number = "defender", None, counters, number
        self.average, self.left, self.version = average, restarts, 0
        self.serving, self.spent, self.notes, self.process_ids = False, False, (), []
        self.weights, self.last_publish, self.first_token = 0, PublishTimes(), None
        self.asked, self.starts, self.hold, self.breaks, self.fails = 0, 0, None, False, False

    def restore(self, served):
        served["w"] = self.average["w"]

    async def start(self):
        if self.serving:
            return
        if self.starts:
            if not self.left:
                self.spent = True
                raise EngineDied(f"replica {self.number} is spent")
            self.left -= 1
        self.starts += 1
        await asyncio.sleep(0.01)
        self.weights, self.serving = self.average["w"], True

    async def generate(self, request):
        self.asked += 1
        weights, version = self.weights, self.version
        if self.hold is not None:
            await self.hold.wait()
        if not self.serving:
            raise EngineDied("died")
        if self.fails:
            raise EngineUnwell("no answer")
        assert weights == version, "a sample with a wrong version"
        return Sample(request.prompt_ids, (version,), (0.0,), "stop", version)

    async def attempt(self, version, write, turn=None):
        await self.start()
        await asyncio.sleep(0.001)
        if self.breaks:
            self.breaks = self.serving = False
            raise PublishFailed("broke", written=False)
        if turn is not None:
            await turn()
        served = {}
        write(served)
        await asyncio.sleep(0.001)
        self.weights, self.version = served["w"], version

    async def close(self):
        self.serving = False

    def die(self):
        self.serving = False
        if self.hold is not None:
            self.hold.set()


class Average:
    """What a learner publishes: `write` moves it."""

    def __init__(self):
        self.moves, self.now = 0, {"w": 0}

    def write(self, served):
        self.moves += 1
        self.now["w"] += 1
        served["w"] = self.now["w"]


def scripted(count=3, **kwargs):
    average, counters = Average(), Counter()
    seats = [Scripted(i, counters, average.now, **kwargs) for i in range(count)]
    return ReplicaEngine(seats), seats, average, counters


async def ask(engine, count):
    return await asyncio.gather(*(engine.generate(engines.request((3, i), i)) for i in range(count)))


async def held_up(engine, seats):
    """Nine requests under way on replicas that hold them."""
    for seat in seats:
        seat.hold = asyncio.Event()
    busy = asyncio.create_task(ask(engine, 9))
    await engines.until(lambda: sum(seat.asked for seat in seats) == 9)
    return busy


def test_requests_go_to_the_least_loaded():
    async def run():
        engine, seats, _, _ = scripted()
        busy = await held_up(engine, seats)
        assert [seat.asked for seat in seats] == [3, 3, 3]
        seats[1].hold.set()
        await engines.until(lambda: engine._seats[1].load == 0)
        more = asyncio.create_task(ask(engine, 3))
        await more
        assert [seat.asked for seat in seats] == [3, 6, 3]
        for seat in seats:
            seat.hold.set()
        assert len(await busy) == 9

    asyncio.run(run())


def test_requests_of_a_dead_replica_move_at_once_and_it_comes_back():
    async def run():
        engine, seats, _, counters = scripted()
        busy = await held_up(engine, seats)
        seats[0].die()
        seats[0].hold = None
        await engines.until(lambda: seats[1].asked + seats[2].asked == 9)
        for seat in seats[1:]:
            seat.hold.set()
        assert len(await busy) == 9
        assert counters["defender_moved"] == 3
        await engines.until(lambda: seats[0].serving and engine._seats[0].up)
        assert [seat.starts for seat in seats] == [2, 1, 1]

    asyncio.run(run())


def test_a_replica_that_fails_draws_less_and_is_asked_again():
    async def run():
        engine, seats, _, _ = scripted(2)
        await engine.start()
        seats[0].fails = True
        with pytest.raises(EngineUnwell):
            await ask(engine, 1)
        seats[0].fails = False
        for seat in seats:
            seat.hold = asyncio.Event()
        busy = asyncio.create_task(ask(engine, 4))
        await engines.until(lambda: sum(seat.asked for seat in seats) == 5)
        assert [seat.asked for seat in seats] == [1 + 1, 3]
        for seat in seats:
            seat.hold.set()
        await busy
        assert engine._seats[0].strikes == 0

    asyncio.run(run())


def test_a_request_that_kills_whoever_takes_it_ends():
    async def run():
        engine, seats, _, _ = scripted()
        await engine.start()
        for seat in seats:
            seat.generate = lambda request, seat=seat: deadly(seat)

        async def deadly(seat):
            seat.die()
            raise EngineDied("died")

        with pytest.raises(EngineDied):
            await engine.generate(engines.request((3,)))
        await engine.close()

    asyncio.run(run())


def test_the_last_one_lost_ends_it_with_its_words():
    async def run():
        engine, seats, _, counters = scripted(2, restarts=0)
        await engine.start()
        for seat in seats:
            seat.die()
        with pytest.raises(EngineDied, match="replica 1 is spent"):
            await ask(engine, 1)
        assert counters["defender_lost"] == 2

    asyncio.run(run())


@pytest.mark.parametrize("broken", [(), (0,), (1,), (0, 1), (0, 1, 2)], ids=str)
def test_the_average_moves_once_whoever_fails(broken):
    async def run():
        engine, seats, average, _ = scripted()
        await engine.start()
        for version in range(1, 4):
            for number in broken:
                seats[number].breaks = version == 2
            await engine.publish(version, average.write)
            assert (engine.version, average.moves) == (version, version)
            assert {sample.version for sample in await ask(engine, 9)} == {version}
        await engines.until(lambda: all(seat.up for seat in engine._seats))
        assert {(seat.version, seat.weights) for seat in seats} == {(3, 3)}

    asyncio.run(run())


def test_a_restart_that_a_publish_overtakes_serves_the_new_version():
    async def run():
        engine, seats, average, _ = scripted(2)
        await engine.start()
        go, start = asyncio.Event(), seats[0].start

        async def slow():
            await start()
            await go.wait()

        seats[0].start = slow
        seats[0].die()
        await ask(engine, 1)
        await engine.publish(1, average.write)
        assert (seats[1].version, seats[0].version, average.moves) == (1, 0, 1)
        go.set()
        await engines.until(lambda: engine._seats[0].up)
        assert (seats[0].version, seats[0].weights, average.moves) == (1, 1, 1)

    asyncio.run(run())


def test_an_error_of_the_trainer_comes_through_and_nobody_repeats_it():
    async def run():
        engine, _, _, _ = scripted()
        calls = []

        def write(served):
            calls.append(1)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await engine.publish(1, write)
        assert len(calls) == 1

    asyncio.run(run())


def paced(seconds):
    """Replicas that answer one request after another, each in its own time."""
    engine, seats, _, counters = scripted(len(seconds))
    for seat, each in zip(seats, seconds, strict=True):
        seat.turn, seat.each, seat.generate = asyncio.Lock(), each, lambda r, seat=seat: in_turn(seat, r)
    return engine, seats, counters


async def in_turn(seat, request):
    async with seat.turn:
        await asyncio.sleep(seat.each)
        return Sample(request.prompt_ids, (0,) * 4, (0.0,) * 4, "stop", seat.version)


async def rounds(engine, count, requests):
    """Seconds and the replicas' shares of rounds, each of so many requests at once, as a step plays."""
    found = []
    for _ in range(count):
        began = time.perf_counter()
        await ask(engine, requests)
        found.append((time.perf_counter() - began, engine.take_shares()))
    return found


def test_a_slow_replica_gets_as_much_less_as_it_is_slower():
    """One of three answers in eight times the others' time: a round is soon bounded by all of them, not by that one."""

    async def run():
        engine, seats, counters = paced([0.002, 0.016, 0.002])
        await engine.start()
        played = await rounds(engine, 14, 60)
        note = []
        told = Replicas(note.append)
        seconds, shares = played[-1]
        assert [share.requests for share in played[0][1]] == [20, 20, 20]
        assert shares[1].requests <= 12  # of 60; by its speed it would be 3.5
        assert seconds < 0.65 * played[0][0]
        assert shares[1].slowness > 2 > 1.5 > max(shares[0].slowness, shares[2].slowness)
        # and it is told of, once
        values = told.take([engine], counters) | told.take([engine], counters)
        assert (counters["defender_slow"], len(note)) == (2, 1)
        assert "defender: replica 1 is" in note[0]
        assert values["replica/defender/1/slowness"] > 2
        # it recovers
        seats[1].each = 0.002
        shares = (await rounds(engine, 20, 60))[-1][1]
        assert shares[1].requests >= 12
        told.take([engine], counters)
        assert counters["defender_slow"] == 2

    asyncio.run(run())


def test_equal_replicas_share_alike():
    async def run():
        engine, _, counters = paced([0.002] * 3)
        await engine.start()
        for _, shares in await rounds(engine, 6, 60):
            assert all(14 <= share.requests <= 26 for share in shares), shares
        Replicas(lambda text: pytest.fail(text)).take([engine], counters)

    asyncio.run(run())


def test_where_load_costs_nothing_the_weights_are_bounded():
    """Engines that batch without end: the slow one is left out but for a few, and is still measured."""
    slowness = Slowness(2)
    for _ in range(500):
        slowness.add(0, 1.0, 100)
        slowness.add(1, 8.0, 100)
    assert slowness.weight(0) == 1
    assert 8 < slowness.weight(1) <= 33
    slowness.forget(1)
    assert slowness.weight(1) == 1


# with real engines


@pytest.fixture(scope="module")
def weights():
    return engines.Weights()


@pytest.fixture(scope="module")
def pair(runner, tmp_path_factory, weights):
    pytest.importorskip("vllm")
    folder = engines.folder(tmp_path_factory.mktemp("m") / "m", seed=0)
    counters = Counter()
    settings = engines.settings(replicas={"defender": 2}, restarts=20)
    made = [
        engines.vllm_engine(
            folder,
            vllm=settings,
            channel=ShmChannel("m", sources_of(weights.now.named_parameters())),
            restore=weights.restore,
            counters=counters,
            launch=launch_threaded,
            replica=i,
        )
        for i in range(2)
    ]
    engine = ReplicaEngine(made)
    runner.run(engine.start())
    yield engine
    pids = engine.process_ids
    runner.run(engine.close())
    runner.run(engines.until(lambda: not any(engines.running(pid) for pid in pids), 5.0))


def kill(engine, how=signal.SIGKILL):
    for pid in engine.process_ids:
        os.kill(pid, how)


def assert_all_serve(runner, engine, weights):
    engines.everybody_up(runner, engine)
    for one in engine.replicas:
        assert one.version == engine.version
        engines.assert_serves(runner, one, weights, PROMPTS)


def requests(count, most=200):
    return [engines.request(PROMPTS[i % 3], i, max_tokens=most) for i in range(count)]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_replica_killed_in_mid_play_loses_nothing(runner, pair, weights):
    async def run():
        busy = [asyncio.create_task(pair.generate(r)) for r in requests(64)]
        await asyncio.sleep(0.05)
        killed = time.perf_counter()
        kill(pair.replicas[0])
        answers = await asyncio.gather(*busy)
        return answers, time.perf_counter() - killed

    before = dict(pair.counters)
    answers, seconds = runner.run(run())
    assert [a.prompt_ids for a in answers] == [r.prompt_ids for r in requests(64)]
    assert seconds < 30
    moved = pair.counters["defender_moved"] - before.get("defender_moved", 0)
    assert 0 < moved <= 33
    assert not pair._seats[0].up, "the answers came while it was being restarted"
    runner.run(pair.publish(pair.version + 1, weights.write))
    assert_all_serve(runner, pair, weights)
    assert pair.counters["defender_restarts"] - before.get("defender_restarts", 0) == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_replica_killed_in_a_publish_is_replaced_and_the_other_goes_on(runner, pair, weights):
    """It dies while the average is written into it: the write stands, and the other copies it."""
    engines.everybody_up(runner, pair)
    moves, restarts = weights.moves, pair.counters["defender_restarts"]

    def write(served):
        kill(pair.replicas[0])
        weights.write(served)

    start = time.perf_counter()
    runner.run(pair.publish(pair.version + 1, write))
    assert time.perf_counter() - start < 25
    assert weights.moves == moves + 1
    (sample,) = engines.play(runner, pair, requests(1))
    assert sample.version == pair.version
    assert_all_serve(runner, pair, weights)
    assert pair.counters["defender_restarts"] == restarts + 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_replica_that_hangs_is_taken_out_by_the_breaker(runner, pair, weights):
    engines.everybody_up(runner, pair)
    settings = pair.replicas[0].settings
    settings.request_timeout_s, before = 4.0, dict(pair.counters)
    kill(pair.replicas[1], signal.SIGSTOP)

    async def persistent(request):
        for _ in range(3):  # as a speaker asks
            with suppress(EngineUnwell):
                return await pair.generate(request)
        raise AssertionError("given up")

    async def run():
        return await asyncio.gather(*(persistent(r) for r in requests(12, most=8)))

    answers = runner.run(run())
    settings.request_timeout_s = 1800.0
    assert len(answers) == 12
    assert pair.counters["defender_breaker"] - before.get("defender_breaker", 0) == 1
    engines.everybody_up(runner, pair)
    assert_all_serve(runner, pair, weights)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_slow_engine_is_asked_less_and_named(runner, pair):
    """Stopped for three quarters of the time: as a node that something else keeps busy."""
    engines.everybody_up(runner, pair)
    pair.take_shares()
    over = asyncio.Event()

    async def pulses():
        pids = pair.replicas[1].process_ids
        try:
            while not over.is_set():
                for pid in pids:
                    os.kill(pid, signal.SIGSTOP)
                await asyncio.sleep(0.12)
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)
                await asyncio.sleep(0.04)
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    async def run():
        slow, found = asyncio.create_task(pulses()), []
        try:
            for _ in range(8):
                began = time.perf_counter()
                await asyncio.gather(*(pair.generate(r) for r in requests(48, most=60)))
                found.append((time.perf_counter() - began, pair.take_shares()))
        finally:
            over.set()
            await slow
        return found

    found = runner.run(run())
    shares = found[-1][1]
    assert shares[1].requests < 0.4 * 48
    assert shares[1].slowness > 1.5 * shares[0].slowness
    # nobody waits for it any more; the clock of a busy machine tells no more than that
    assert sum(seconds for seconds, _ in found[-3:]) < 2 * sum(seconds for seconds, _ in found[:3])
