"""Several engines of one model behind the engine protocol: the slow get fewer requests, the dead are replaced."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from torch import Tensor

from advgame.game.tree import Sample
from advgame.rollout.channel import PublishTimes, Write
from advgame.rollout.engine import EngineDied, EngineUnwell, Request
from advgame.rollout.first_token import FirstToken
from advgame.rollout.slowness import Slowness
from advgame.rollout.vllm_engine import VllmEngine


@dataclass(eq=False)
class Seat:
    """One replica. up: it gets requests; load: how many it has; strikes: failures in a row; life: starts so far (a
    late report of an earlier life's death is no news); lost: why it is never started again; made: completions."""

    engine: VllmEngine
    number: int = 0
    up: bool = True
    load: int = 0
    strikes: int = 0
    life: int = 0
    lost: str = ""
    made: int = 0
    reviving: asyncio.Task[None] | None = None

    @property
    def rank(self) -> int:
        """A replica that fails is idle soon, and must not draw everything to itself for that."""
        return (self.load + 1) << min(self.strikes, 30)


@dataclass(frozen=True)
class Share:
    """One replica's completions in some time, and how many times as slow it is as the fastest, about."""

    requests: int
    slowness: float


class ReplicaEngine:
    """N VllmEngines of the same model, which share counters.

    A request goes to the replica with the fewest under way, each counted as often as the replica is slow (`Slowness`).
    One whose replica dies is asked of another at once (`<name>_moved`). The dead one is restarted beside play and
    serves again when its weights are of the current version. A publish goes to all replicas at once: the first that is
    quiet gets `write`, which moves the trainer's average, the others its `restore`, which copies it. One whose publish
    fails is replaced, and the others go on. Use from one event loop only.
    """

    def __init__(self, replicas: Sequence[VllmEngine]):
        first = replicas[0]
        self.name, self.folder, self.counters = first.name, first.folder, first.counters
        self.first_token = FirstToken()
        for one in replicas:
            one.first_token = self.first_token
        self._seats = [Seat(one, number) for number, one in enumerate(replicas)]
        self._slowness = Slowness(len(replicas))
        self._version = first.version
        self._publishing, self._starting = asyncio.Lock(), asyncio.Lock()
        self._news = asyncio.Event()
        self._started = False

    @property
    def version(self) -> int:
        return self._version

    @property
    def replicas(self) -> list[VllmEngine]:
        return [seat.engine for seat in self._seats]

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(note for one in self.replicas for note in one.notes))

    @property
    def process_ids(self) -> list[int]:
        return [pid for one in self.replicas for pid in one.process_ids]

    @property
    def last_publish(self) -> PublishTimes:
        """The longest of each part over the replicas."""
        times = [one.last_publish for one in self.replicas]
        return PublishTimes(*(max(getattr(one, part.name) for one in times) for part in fields(PublishTimes)))

    async def start(self) -> None:
        """Starts all. Raises the first error once every start has ended."""
        if self._started:
            return
        async with self._starting:
            outcomes = await asyncio.gather(*(one.start() for one in self.replicas), return_exceptions=True)
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    raise outcome
            self._started = True

    async def generate(self, request: Request) -> Sample:
        """As VllmEngine's; EngineDied only when as many replicas died of this request as there are, or none is left."""
        await self.start()
        for _ in self._seats:
            seat = await self._least_loaded()
            life = seat.life
            seat.load += 1
            began = time.perf_counter()
            try:
                sample = await seat.engine.generate(request)
            except EngineDied as error:
                died = error
                self._down(seat, life)
                self.counters[f"{self.name}_moved"] += 1
                continue
            except EngineUnwell:
                seat.strikes += 1
                raise
            finally:
                seat.load -= 1
            seat.strikes, seat.made = 0, seat.made + 1
            if seat.life == life:
                self._slowness.add(seat.number, time.perf_counter() - began, len(sample.token_ids))
            return sample
        raise died

    def take_shares(self) -> list[Share]:
        """What each replica has done since the last call."""
        shares = [Share(seat.made, self._slowness.weight(seat.number)) for seat in self._seats]
        for seat in self._seats:
            seat.made = 0
        return shares

    async def publish(self, version: int, write: Write) -> None:
        """Returns when every replica that is up serves `version`. Raises EngineDied when none is left."""
        await self.start()
        async with self._publishing:

            def moving(served: Mapping[str, Tensor]) -> None:
                write(served)
                self._version = version

            publish = _Publish(version, moving)
            while (behind := publish.behind(self._ready())) or not publish.moved:
                if not behind:
                    await self._somebody()
                for seat in await publish.round(behind):
                    self._down(seat, seat.life)

    async def close(self) -> None:
        tasks = [seat.reviving for seat in self._seats if seat.reviving is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(one.close() for one in self.replicas))

    def _ready(self) -> list[Seat]:
        """The replicas that serve now."""
        for seat in self._seats:
            if seat.up and not seat.engine.serving:
                self._down(seat, seat.life)
        return [seat for seat in self._seats if seat.up]

    async def _least_loaded(self) -> Seat:
        while not (ready := self._ready()):
            await self._somebody()
        return min(ready, key=lambda seat: seat.rank * self._slowness.weight(seat.number))

    async def _somebody(self) -> None:
        """Returns when a replica is up. Raises EngineDied with the last one's words when none will be."""
        while not any(seat.up for seat in self._seats):
            if all(seat.lost for seat in self._seats):
                raise EngineDied(self._seats[-1].lost)
            self._news.clear()
            await self._news.wait()

    def _down(self, seat: Seat, life: int) -> None:
        if seat.up and seat.life == life:
            seat.up = False
            seat.reviving = asyncio.create_task(self._revive(seat))

    async def _revive(self, seat: Seat) -> None:
        """Restarts a replica until it serves the current version, or is given up."""
        engine = seat.engine
        try:
            while not (engine.serving and engine.version == self._version):
                try:
                    await engine.start()
                    if engine.version != self._version:
                        # its start and a publish to its siblings may have overlapped
                        await engine.attempt(self._version, restored(engine))
                except EngineDied:
                    if engine.spent and not engine.serving:
                        raise
        except Exception as error:
            seat.lost = str(error) or type(error).__name__
            self.counters[f"{self.name}_lost"] += 1
        else:
            seat.up, seat.strikes, seat.life = True, 0, seat.life + 1
            self._slowness.forget(seat.number)
        self._news.set()


class _Publish:
    """One version on its way to the replicas. `moved`: `write` has run, and what follows is copies."""

    def __init__(self, version: int, write: Write):
        self.moved = False
        self._version, self._write = version, write
        self._failed: Exception | None = None
        self._done: set[Seat] = set()

    def behind(self, seats: Sequence[Seat]) -> list[Seat]:
        """Those that still have to be told; one that was restarted meanwhile may have the new weights already."""
        return [s for s in seats if s not in self._done and not (self.moved and s.engine.version == self._version)]

    async def round(self, seats: Sequence[Seat]) -> list[Seat]:
        """Publishes to all of these at once; returns those that died of it. Raises what `write` raises."""
        loop = asyncio.get_running_loop()
        turns = [loop.create_future() for _ in seats]
        found = await asyncio.gather(*(self._bring(s, i, turns) for i, s in enumerate(seats)), return_exceptions=True)
        for outcome in found:
            if isinstance(outcome, BaseException) and not isinstance(outcome, EngineDied):
                raise outcome
        return [seat for seat, outcome in zip(seats, found, strict=True) if outcome is not None]

    async def _bring(self, seat: Seat, number: int, turns: list[asyncio.Future[None]]) -> None:
        async def turn() -> None:
            # in order, so that the average is always written into the same engine where that is well
            if number:
                await asyncio.wait(turns[:number])

        def fill(served: Mapping[str, Tensor]) -> None:
            self._fill(seat.engine, served)
            turns[number].set_result(None)

        try:
            await seat.engine.attempt(self._version, fill, turn)
            self._done.add(seat)
        finally:
            if not turns[number].done():
                turns[number].set_result(None)

    def _fill(self, engine: VllmEngine, served: Mapping[str, Tensor]) -> None:
        if self._failed is not None:
            raise self._failed
        if self.moved:
            restored(engine)(served)
            return
        try:
            self._write(served)
        except Exception as error:
            self._failed = error  # the average may be half moved: nobody else may move it again
            raise
        self.moved = True


Served = VllmEngine | ReplicaEngine
"""A model that vLLM samples, by one engine or by several."""


def restored(engine: VllmEngine) -> Write:
    assert engine.restore is not None, "an engine that takes weights can restore them"
    return engine.restore
