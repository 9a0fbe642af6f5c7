"""Discrete-event simulation of asynchronous play: trees as coroutines, engine replicas as shared processors.

All completions of a replica advance together, a token each decode step, and the step's time depends on how many
there are. A replica therefore keeps one clock in tokens; a completion ends when that clock passes its mark. A prefill
stops the clock of its replica for its own time. Every request passes the driver first, one at a time. What shares a
GPU, or a machine of so many `cores` with the driver, takes turns.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from advgame.plan.workload import Branch, Request, TreeDraw

Part = Callable[[Callable[[], None]], None]
"""Starts something and calls back when it has ended."""
Process = Generator[list[Part], None, None]
"""Stages, each of parts that run side by side."""


@dataclass(frozen=True)
class EngineCost:
    """What a replica's steps cost. `step(active, context)`: seconds of one decode step; `prefill(tokens)`: seconds."""

    step: Callable[[int, float], float]
    prefill: Callable[[float, float], float]
    most: int  # completions at once


class Replica:
    """One engine replica of a role, on a GPU that it may share with others."""

    def __init__(self, role: str, cost: EngineCost, gpu: int):
        self.role, self.cost, self.gpu = role, cost, gpu
        self.clock = 0.0  # tokens that every active completion has made since the start
        self.last = 0.0
        self.stalled_until = 0.0
        self.active: list[tuple[float, int, Request, Callable[[], None]]] = []
        self.waiting: deque[tuple[Request, Callable[[], None]]] = deque()
        self.context = 0.0
        self.generation = 0
        self.busy = 0.0
        self.tokens = 0

    @property
    def load(self) -> int:
        return len(self.active) + len(self.waiting)

    def token_seconds(self, slower: float) -> float:
        return self.cost.step(len(self.active), self.context / max(1, len(self.active))) * slower

    def advance(self, now: float, slower: float) -> None:
        if self.active:
            moving = now - max(self.last, min(now, self.stalled_until))
            self.clock += moving / self.token_seconds(slower)
            self.busy += now - self.last
        self.last = now


@dataclass(frozen=True)
class PlayResult:
    """One batch of trees: its seconds, and by role the busy share of its replicas, the tokens they made and the
    seconds of all requests, waits for the driver included."""

    seconds: float
    busy: dict[str, float]
    tokens: dict[str, int]
    requests: int
    driver: float  # busy share of the driver
    waited: dict[str, float] = field(default_factory=dict)


class Simulation:
    """Plays trees on replicas. `driver` is the seconds that the driver spends on one request. `cores`: of the machine
    on which everything runs (the `gpu` of all replicas is 0 then), a core for each replica at work and one for the
    driver; None: replicas share what their `gpu` says, and the driver nothing. Roles may name the same replicas."""

    def __init__(self, replicas: Mapping[str, Sequence[Replica]], driver: float, cores: int | None = None):
        self.replicas, self.driver, self.cores = replicas, driver, cores
        self.events: list[tuple[float, int, Replica | None, int, Callable[[], None] | None]] = []
        self.count = itertools.count()
        self.now = self.driver_free = self.driver_busy = 0.0
        self.requests = 0
        self.on_gpu: dict[int, list[Replica]] = {}
        self.waited = dict.fromkeys(replicas, 0.0)
        for replica in dict.fromkeys(itertools.chain.from_iterable(replicas.values())):
            self.on_gpu.setdefault(replica.gpu, []).append(replica)
        self.slower = dict.fromkeys(self.on_gpu, 1.0)

    def play(self, trees: Sequence[TreeDraw]) -> PlayResult:
        for tree in trees:
            self._run(self._tree(tree), lambda: None)
        while self.events:
            self.now, _, replica, generation, call = heapq.heappop(self.events)
            if call is not None:
                call()
            elif replica is not None and generation == replica.generation:
                self._finish(replica)
        busy = {
            role: sum(r.busy for r in rs) / (len(rs) * self.now) if rs and self.now else 0.0
            for role, rs in self.replicas.items()
        }
        tokens = {role: sum(r.tokens for r in rs) for role, rs in self.replicas.items()}
        return PlayResult(
            self.now, busy, tokens, self.requests, self.driver_busy / self.now if self.now else 0.0, self.waited
        )

    def _tree(self, tree: TreeDraw) -> Process:
        yield [partial(self._run, self._branch(branch)) for branch in tree.branches]
        if tree.final:
            yield [partial(self._send, request) for request in tree.final]

    def _branch(self, branch: Branch) -> Process:
        for stage in branch.stages():
            yield [partial(self._send, request) for request in stage]

    def _run(self, process: Process, done: Callable[[], None]) -> None:
        """Starts every part of each stage and goes on when all of them have ended."""

        def go_on() -> None:
            try:
                parts = next(process)
            except StopIteration:
                done()
                return
            left = [len(parts)]

            def one_less() -> None:
                left[0] -= 1
                if left[0] == 0:
                    go_on()

            for part in parts:
                part(one_less)

        go_on()

    def _send(self, request: Request, done: Callable[[], None]) -> None:
        self.requests += 1
        sent, start = self.now, max(self.now, self.driver_free)
        self.driver_free = start + self.driver * (self._slower(0) if self.cores else 1.0)
        self.driver_busy += self.driver_free - start

        def ended() -> None:
            self.waited[request.role] += self.now - sent
            done()

        self._at(self.driver_free, lambda: self._arrive(request, ended))

    def _at(self, when: float, call: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.count), None, 0, call))

    def _arrive(self, request: Request, done: Callable[[], None]) -> None:
        replica = min(self.replicas[request.role], key=lambda r: r.load)
        replica.waiting.append((request, done))
        self._change(replica, lambda: self._admit(replica))

    def _admit(self, replica: Replica) -> None:
        while replica.waiting and len(replica.active) < replica.cost.most:
            request, done = replica.waiting.popleft()
            slower = self._slower(replica.gpu)
            prefill = replica.cost.prefill(request.prompt - request.cached, request.prompt / 2) * slower
            replica.stalled_until = max(self.now, replica.stalled_until) + prefill
            replica.context += request.prompt + request.tokens / 2
            heapq.heappush(replica.active, (replica.clock + request.tokens, next(self.count), request, done))

    def _finish(self, replica: Replica) -> None:
        ended: list[Callable[[], None]] = []

        def pop() -> None:
            while replica.active and replica.active[0][0] <= replica.clock + 1e-6:
                _, _, request, done = heapq.heappop(replica.active)
                replica.context -= request.prompt + request.tokens / 2
                replica.tokens += request.tokens
                ended.append(done)
            self._admit(replica)

        self._change(replica, pop)
        for done in ended:
            done()

    def _slower(self, place: int) -> float:
        """How many times longer everything takes there now: each replica at work gets an equal share of a GPU; on a
        machine they and the driver share the cores."""
        group = self.on_gpu.get(place, ())
        if self.cores is None and len(group) == 1:
            return 1.0
        active = sum(bool(r.active) for r in group)
        if self.cores is None:
            return max(1.0, active)
        return max(1.0, (active + (self.driver_free > self.now)) / self.cores)

    def _change(self, replica: Replica, change: Callable[[], None]) -> None:
        """Brings the clocks of a place's replicas up to now, changes one of them, and plans their next ends anew."""
        place = replica.gpu
        group, before = self.on_gpu[place], self.slower[place]
        for one in group:
            one.advance(self.now, before)
        change()
        after = self.slower[place] = self._slower(place)
        for one in group if after != before else [replica]:
            one.generation += 1
            if one.active:
                left = max(0.0, one.active[0][0] - one.clock) * one.token_seconds(after)
                when = max(self.now, one.stalled_until) + left
                heapq.heappush(self.events, (when, next(self.count), one, one.generation, None))
