"""A speaker: one engine, its chat format and sampling settings, asked by text and answered by text and tokens."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from advgame.game.tree import Sample
from advgame.rollout.engine import Engine, EngineError, Request, Sampling, stream_seed
from advgame.rollout.meter import Meter


class Chat(Protocol):
    """A tokenizer's chat format."""

    def prompt_ids(self, user: str) -> tuple[int, ...]:
        """One user turn and the opening of the assistant's, as token ids."""

    def text(self, token_ids: Sequence[int]) -> str:
        """Decoded tokens, special tokens removed, outer white space stripped."""


class Asks(Protocol):
    """Whoever can be asked by text: an engine's speaker or a server's."""

    counters: Counter[str]

    async def ask(
        self, user: str, key: tuple[int, ...], sampling: Sampling | None = None, stop: tuple[str, ...] = ()
    ) -> tuple[Sample | None, str]:
        """(what was sampled, its text); (None, "") when nothing came back. `stop`: as in `Request`."""


@dataclass
class Speaker:
    """Asks an engine, retries its failures and counts them in `counters` (keys `<name>_...`); `meter`: its time."""

    name: str
    engine: Engine
    chat: Chat
    sampling: Sampling
    run_seed: int
    retries: int = 2
    backoff_s: float = 0.0
    counters: Counter[str] = field(default_factory=Counter)
    last_error: str = ""
    meter: Meter = field(default_factory=Meter)

    async def ask(
        self, user: str, key: tuple[int, ...], sampling: Sampling | None = None, stop: tuple[str, ...] = ()
    ) -> tuple[Sample | None, str]:
        """(what was sampled, its text); (None, "") when the engine failed `retries + 1` times."""
        prompt_ids = self.chat.prompt_ids(user)
        request = Request(prompt_ids, sampling or self.sampling, key, stream_seed(self.run_seed, key), stop)
        for attempt in range(self.retries + 1):
            self.counters[f"{self.name}_requests"] += 1
            try:
                with self.meter.use():
                    sample = await self.engine.generate(request)
            except EngineError as error:
                self.last_error = str(error)
                self.counters[f"{self.name}_failures"] += 1
                await asyncio.sleep(self.backoff_s * 2**attempt)
                continue
            self.counters[f"{self.name}_tokens"] += len(sample.token_ids)
            return sample, self.chat.text(sample.token_ids)
        self.counters[f"{self.name}_given_up"] += 1
        return None, ""
