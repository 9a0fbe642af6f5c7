"""Models that a red-team run talks to: an engine in this machine or a server behind a URL, by whole conversations."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from advgame.rollout.chat import ChatFormat
from advgame.rollout.endpoint_engine import client_of, completion_tokens, first_choice, request_body, text_of
from advgame.rollout.endpoint_http import EndpointRefused
from advgame.rollout.engine import Engine, EngineError, Request, Sampling
from advgame.rollout.settings import EndpointSettings

Turns = Sequence[tuple[str, str]]
"""A conversation as (role, text): an optional system turn, then user and assistant by turns, a user turn last."""

REFUSED_FOR_GOOD = (400, 413, 422)
"""Statuses that speak of this one request (too long, filtered); other 4xx speak of the address or the key."""


class Rejected(EngineError):
    """This request will never be answered: too long for the model, or refused by the server as it is."""


@dataclass(frozen=True)
class Answer:
    """What a model said. Token counts are None where a server does not tell."""

    text: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None

    @property
    def tokens(self) -> int:
        return (self.prompt_tokens or 0) + (self.completion_tokens or 0)


class Model(Protocol):
    """Someone to talk to. `identity` names the weights or the server: it tells runs apart that must not be mixed."""

    identity: str
    counters: Counter[str]

    async def chat(self, turns: Turns, sampling: Sampling, seed: int) -> Answer:
        """Raises Rejected for a request that can never be answered, EngineError for a failure after all retries."""

    async def close(self) -> None: ...


@dataclass
class LocalModel:
    """An engine and its chat format. `positions`: the longest prompt with its completion, None if unknown."""

    name: str
    identity: str
    engine: Engine
    format: ChatFormat
    positions: int | None
    counters: Counter[str]
    retries: int = 2

    async def chat(self, turns: Turns, sampling: Sampling, seed: int) -> Answer:
        ids = self.format.conversation_ids(turns)
        if self.positions is not None and len(ids) + sampling.max_tokens > self.positions:
            raise Rejected(
                f"{self.name}: {len(ids)} prompt tokens and {sampling.max_tokens} to sample exceed the model's "
                f"{self.positions} positions"
            )
        request = Request(ids, sampling, (seed,), seed)
        for attempt in range(self.retries + 1):
            try:
                sample = await self.engine.generate(request)
            except EngineError:
                self.counters[f"{self.name}_engine_failures"] += 1
                if attempt == self.retries:
                    raise
                continue
            text = self.format.text(sample.token_ids)
            return Answer(text, sample.finish_reason, len(ids), len(sample.token_ids))
        raise AssertionError("the loop returns or raises")

    async def close(self) -> None:
        await self.engine.close()


class RemoteModel:
    """An OpenAI-compatible server: concurrency, rate, back-off and time limits are those of `JsonClient`.

    An answer of the wrong shape is asked for again like a failure, up to the settings' retries.
    """

    def __init__(self, name: str, settings: EndpointSettings, counters: Counter[str]):
        self.name, self.settings, self.counters = name, settings, counters
        self.identity = f"{settings.url}#{settings.model}"
        self._client = client_of(settings, name, counters)

    async def chat(self, turns: Turns, sampling: Sampling, seed: int) -> Answer:
        body = request_body(self.settings.model, sampling, seed)
        chat = self.settings.api == "chat"
        if chat:
            body["messages"] = [{"role": role, "content": text} for role, text in turns]
        else:
            # a server without a chat template is given the bare text, which only single turns have
            body["prompt"] = "\n\n".join(text for _, text in turns)
        for attempt in range(self.settings.retries + 1):
            try:
                got = await self._client.post("/chat/completions" if chat else "/completions", body)
            except EndpointRefused as error:
                if error.status in REFUSED_FOR_GOOD:
                    raise Rejected(str(error)) from None
                raise
            try:
                choice, answer = first_choice(got, self.name)
                text = text_of(choice, chat, self.name)
            except EngineError as error:
                self.counters[f"{self.name}_malformed_answers"] += 1
                if attempt == self.settings.retries:
                    raise EngineError(f"{self.name}: {self._client.host} sends answers of another form") from error
                await asyncio.sleep(self.settings.backoff_s * 2**attempt)
                continue
            usage = answer.get("usage")
            prompt = usage.get("prompt_tokens") if isinstance(usage, dict) else None
            known = isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int)
            return Answer(
                text.strip(),
                str(choice.get("finish_reason")),
                prompt if isinstance(prompt, int) else None,
                completion_tokens(answer) if known else None,
            )
        raise AssertionError("the loop returns or raises")

    async def close(self) -> None:
        self._client.close()
