"""Completions of one model on one set: a fixed number in flight, each stored as it comes, resumed by row id."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from advgame.evals.models import EngineSettings, Opened, open_model
from advgame.evals.named import ModelSpec
from advgame.evals.row import EvalRow
from advgame.evals.row_index import RowIndex
from advgame.evals.store import Store, completion_line, digest
from advgame.evals.suites import Generation, SetSettings
from advgame.rollout.engine import EngineError, Sampling

T = TypeVar("T")
Tick = Callable[[int, int], None]
"""Told (rows done, rows in all)."""

FAILURES_IN_A_ROW = 20
"""A server that fails this often without a success between is down; what was made is kept."""


def sampling_of(settings: SetSettings | None, own: Generation) -> Sampling:
    """The set's convention where the suite says nothing: temperature 1 for XSTest and OR-Bench (safety-eval), 150
    tokens for JailbreakBench, otherwise temperature 0 and 512 tokens.
    """
    kind = settings.set if settings is not None else ""
    temperature = 1.0 if kind in ("xstest", "or-bench") else 0.0
    max_tokens = 150 if kind == "jailbreakbench" else 512
    return Sampling(
        temperature if own.temperature is None else own.temperature, own.top_p, own.max_tokens or max_tokens
    )


async def pool(items: Iterable[T], work: Callable[[T], Awaitable[None]], width: int) -> None:
    """`work` on every item, at most `width` at once; items are drawn as there is room. The first error ends it."""
    source = iter(items)

    async def worker() -> None:
        for item in source:
            await work(item)

    async with asyncio.TaskGroup() as group:
        for _ in range(width):
            group.create_task(worker())


class Strikes:
    """Counts failures in a row; too many raise EngineError with what the last one said."""

    def __init__(self, most: int | None, what: str):
        self._most, self._what, self._now = most, what, 0

    def hit(self, error: str | None) -> None:
        self._now = self._now + 1 if error else 0
        if self._most is not None and self._now >= self._most:
            raise EngineError(
                f"{self._now} {self._what} failed in a row (the last: {error}); what was made is kept, the same "
                "command goes on from there"
            )


def strikes_of(spec: ModelSpec | None, width: int, what: str) -> Strikes:
    """Of a server; an engine in this machine fails row by row (too long a prompt) and restarts by itself."""
    remote = spec is not None and spec.endpoint is not None
    return Strikes(max(FAILURES_IN_A_ROW, 2 * width) if remote else None, what)


@dataclass
class Generator:
    """One model for `generate`, opened when a row lacks its completion. `identity` tells its weights apart."""

    spec: ModelSpec
    settings: EngineSettings
    name: str
    seed: int
    counters: Counter[str]
    _open: Opened | None = None

    @cached_property
    def identity(self) -> str:
        return self.spec.identity()

    async def opened(self) -> Opened:
        """The model, loaded now if it was not. Raises InputError or EngineError with one line."""
        if self._open is None:
            self._open = await open_model(
                self.spec, Sampling(), self.settings, name=self.name, seed=self.seed, counters=self.counters
            )
        return self._open

    async def close(self) -> None:
        if self._open is not None:
            await self._open.close()


def request_digest(row: EvalRow, sampling: Sampling, identity: str, seed: int) -> int:
    """Names what was asked of whom and how; a stored completion with another one is made anew."""
    given = "" if row.response is None else f"given {row.response}"
    return digest(row.prompt, row.judged, given, sampling, identity, seed)


async def generate(
    rows: Callable[[], Iterator[EvalRow]], sampling: Sampling, generator: Generator, store: Store, tick: Tick
) -> Counter[str]:
    """Fills `store`. `rows` is drawn from twice. Returns counts: rows, made, kept, dropped, failed, cut,
    reasoned (answers that began with a reasoning block, which classifiers do not read).

    Raises EngineError when a server is down; the store is intact then.
    """
    wanted = RowIndex()
    for row in rows():
        wanted[digest(row.id)] = request_digest(row, sampling, generator.identity, generator.seed)
    done, dropped = store.open(lambda name: wanted.get(digest(name)))
    counts = Counter({"rows": len(wanted), "dropped": dropped, "kept": sum(key in wanted for key in done)})
    finished = counts["kept"]
    tick(finished, counts["rows"])
    if finished == counts["rows"]:
        store.close()
        return counts
    model = await generator.opened()
    speaker = model.speaker
    strikes = strikes_of(generator.spec, model.width, "completions")

    async def one(row: EvalRow) -> None:
        nonlocal finished
        name = digest(row.id)
        request, error, finish, response = wanted[name], None, "given", row.response
        if response is None:
            sample, text = await speaker.ask(row.prompt, (name,), sampling)
            if sample is None:
                error, finish = str(getattr(speaker, "last_error", "")) or "no answer", "failed"
            else:
                response, finish = text, sample.finish_reason
        line = completion_line(row, request, response, finish, error)
        store.add(line)
        counts["reasoned"] += "answer" in line
        counts["failed" if error else "made"] += 1
        counts["cut"] += finish == "length"
        finished += 1
        tick(finished, counts["rows"])
        strikes.hit(error)

    try:
        await pool((row for row in rows() if digest(row.id) not in done), one, model.width)
    finally:
        store.close()
    return counts
