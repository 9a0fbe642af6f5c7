"""What is being played: the loop asks for the trees of a step, which may have begun before, and may end after it.

A round is the play of one step's seeds. With `run.ahead: 1` the next round begins while this step learns; with
`run.carry_over` a step takes what has ended once enough has, and its late trees come with the next step's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from advgame.errors import InputError
from advgame.game.play import play_batch
from advgame.game.tree import Seed, Tree
from advgame.rollout.meter import Meter
from advgame.run.session import Session

Place = tuple[int, int]
"""(step, index) of a tree: its name within a run."""


@dataclass
class _Round:
    """One step's play. missing: indices still in flight; ended: trees that no step has taken yet."""

    total: int
    missing: set[int]
    ended: dict[int, Tree]
    task: asyncio.Task[None] | None = None


class Plays:
    """The rounds of a run. Every tree that is begun is given to exactly one step.

    A step's batch holds every tree of earlier steps that is left (they are waited for, so nothing is late by more than
    one step) and its own but for the share `run.carry_over`; the last step waits for all.
    """

    def __init__(self, session: Session, kept: Sequence[Tree] = (), owed: Iterable[Place] = ()) -> None:
        """`kept`: trees that a checkpoint holds, ended and not yet learned from; `owed`: begun, to be played again."""
        run = session.config.run
        self._session, self._steps, self._share = session, run.steps, run.carry_over
        self._rounds: dict[int, _Round] = {}
        self._news = asyncio.Event()
        self._meter = Meter()
        self._ended = 0
        places = set(owed)
        for step in sorted({tree.step for tree in kept} | {step for step, _ in places}):
            ended = {tree.index: tree for tree in kept if tree.step == step}
            self._begin(step, {index for other, index in places if other == step}, ended)

    def begin(self, step: int) -> None:
        """Starts the round of `step`, unless it was started before."""
        if step not in self._rounds:
            self._begin(step, None, {})

    async def ready(self, step: int) -> None:
        """Returns when `batch(step)` would not wait. Raises what a tree raised."""
        while not self._enough(step):
            for one in self._rounds.values():
                if one.task is not None and one.task.done():
                    one.task.result()
            self._news.clear()
            await self._news.wait()

    async def batch(self, step: int) -> list[Tree]:
        """The trees that `step` learns from, by step and index."""
        self.begin(step)
        await self.ready(step)
        trees: list[Tree] = []
        for number, one in sorted(self._rounds.items()):
            if number <= step:
                trees += [one.ended[index] for index in sorted(one.ended)]
                one.ended.clear()
                if not one.missing:
                    del self._rounds[number]
        return trees

    @property
    def kept(self) -> list[Tree]:
        """Ended trees that no step has taken."""
        return [one.ended[i] for _, one in sorted(self._rounds.items()) for i in sorted(one.ended)]

    @property
    def owed(self) -> list[Place]:
        """Trees in flight."""
        return [(step, index) for step, one in sorted(self._rounds.items()) for index in sorted(one.missing)]

    def take(self) -> tuple[float, int]:
        """(seconds with trees in flight, trees that ended) since the last call."""
        busy, _ = self._meter.take()
        ended, self._ended = self._ended, 0
        return busy, ended

    async def close(self) -> None:
        """Cancels what is in flight."""
        tasks = [one.task for one in self._rounds.values() if one.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, step: int, indices: set[int] | None, ended: dict[int, Tree]) -> None:
        seeds = self._session.seeds.batch(step)
        missing = set(range(len(seeds))) if indices is None else indices
        if missing and max(missing) >= len(seeds):
            raise InputError(
                f"data.harmful, data.benign: tree {max(missing)} of step {step} was in flight, but a step now has "
                f"{len(seeds)} seeds; resume with the saved numbers"
            )
        one = self._rounds[step] = _Round(len(seeds), missing, ended)
        if missing:
            one.task = asyncio.create_task(self._play(one, step, seeds))
            one.task.add_done_callback(lambda _: self._news.set())

    async def _play(self, one: _Round, step: int, seeds: Sequence[Seed]) -> None:
        def took(tree: Tree) -> None:
            one.missing.remove(tree.index)
            one.ended[tree.index] = tree
            self._ended += 1
            self._news.set()
            if not one.missing:
                in_use.close()  # now, since learning may block this thread before the task comes to its end

        with ExitStack() as in_use:
            in_use.enter_context(self._meter.use())
            await play_batch(
                self._session.table,
                seeds,
                step,
                in_flight=self._session.config.rollout.in_flight,
                only=frozenset(one.missing),
                on_tree=took,
            )

    def _enough(self, step: int) -> bool:
        for number, one in self._rounds.items():
            late = int(self._share * one.total) if number == step and step + 1 < self._steps else 0
            if number <= step and len(one.missing) > late:
                return False
        return True
