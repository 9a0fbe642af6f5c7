"""An OpenAI-compatible server as a judge's speaker (text in, text out) or as an engine (token ids in and out)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor

from advgame.errors import InputError
from advgame.game.tree import Sample
from advgame.rollout.endpoint_http import JsonClient
from advgame.rollout.engine import EngineError, Request, Sampling, end_of_stop, stream_seed
from advgame.rollout.meter import Meter
from advgame.rollout.settings import EndpointSettings


def check_endpoint(settings: EndpointSettings, field: str) -> str:
    """The server's host, as printed and recorded. InputError for a bad address or a missing key; sends nothing."""
    parts = urlsplit(settings.url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"{field}.url: {settings.url!r} is no address; write http://host:port/v1")
    if "@" in parts.netloc:
        raise InputError(f"{field}.url: no user or password in the address; name a variable in {field}.api_key_env")
    name = settings.api_key_env
    if name is not None and not os.environ.get(name):
        raise InputError(f"{field}.api_key_env: the environment variable {name} is not set; export it")
    return parts.netloc


def client_of(settings: EndpointSettings, name: str, counters: Counter[str] | None = None) -> JsonClient:
    return JsonClient(
        settings.url,
        name=name,
        timeout_s=settings.timeout_s,
        retries=settings.retries,
        backoff_s=settings.backoff_s,
        concurrency=settings.concurrency,
        per_minute=settings.rpm,
        api_key=os.environ[settings.api_key_env] if settings.api_key_env else None,
        counters=counters,
    )


class EndpointSpeaker:
    """Asks a server by text, with the server's own chat template (`api: chat`) or none (`api: completions`).

    A stop text is not sent: most servers would leave it out of the answer, and then nobody could tell a verdict from
    one that broke off. The answer is cut behind it, and counts as finished there.

    Counts in `counters` under the keys of `Speaker`. Samples have no tokens and no log-probs: a judge needs neither.
    """

    def __init__(
        self,
        name: str,
        settings: EndpointSettings,
        sampling: Sampling,
        run_seed: int,
        counters: Counter[str] | None = None,
    ):
        self.name, self.settings, self.sampling, self.run_seed = name, settings, sampling, run_seed
        self.counters = Counter[str]() if counters is None else counters
        self.meter = Meter()
        self.last_error = ""
        self._client = client_of(settings, name, self.counters)

    def messages(self, user: str) -> list[dict[str, str]]:
        """The conversation that is sent: one user turn."""
        return [{"role": "user", "content": user}]

    async def ask(
        self, user: str, key: tuple[int, ...], sampling: Sampling | None = None, stop: tuple[str, ...] = ()
    ) -> tuple[Sample | None, str]:
        """(an empty sample with the finish reason, the text); (None, "") when the server failed or refused."""
        body = request_body(self.settings.model, sampling or self.sampling, stream_seed(self.run_seed, key))
        chat = self.settings.api == "chat"
        path = "/chat/completions" if chat else "/completions"
        body |= {"messages": self.messages(user)} if chat else {"prompt": user}
        self.counters[f"{self.name}_requests"] += 1
        try:
            with self.meter.use():
                posted = await self._client.post(path, body)
            choice, answer = first_choice(posted, self.name)
            text = text_of(choice, chat, self.name)
        except EngineError as error:
            self.last_error = str(error)
            self.counters[f"{self.name}_failures"] += 1
            self.counters[f"{self.name}_given_up"] += 1
            return None, ""
        self.counters[f"{self.name}_tokens"] += _count(answer, "completion_tokens")
        if isinstance((cached := _usage(answer, "prompt_tokens_details", "cached_tokens")), int):
            self.counters[f"{self.name}_prompt_tokens"] += _count(answer, "prompt_tokens")
            self.counters[f"{self.name}_cached_tokens"] += cached
        end = end_of_stop(text, stop)
        reason = str(choice.get("finish_reason")) if end is None else "stop"
        return Sample((), (), (), reason, 0), text[:end].strip()

    async def close(self) -> None:
        self._client.close()


class EndpointEngine:
    """Token ids in and out through /completions, for servers that return them (vLLM's `return_token_ids`).

    Serves its own weights: version 0 for ever, `publish` is refused. Log-probs are those of the server, which must
    have been started with raw ones (vLLM: --logprobs-mode raw_logprobs) if they shall stand for a reference.
    """

    def __init__(self, name: str, settings: EndpointSettings, counters: Counter[str] | None = None):
        self.name, self.settings = name, settings
        self._client = client_of(settings, name, counters)

    @property
    def version(self) -> int:
        return 0

    async def start(self) -> None:
        """Nothing to do; the first request connects."""

    async def generate(self, request: Request) -> Sample:
        """Raises EngineError when the server fails, refuses, or answers without token ids."""
        body = request_body(self.settings.model, request.sampling, request.seed)
        body |= {"prompt": list(request.prompt_ids), "logprobs": 0, "return_token_ids": True}
        choice, _ = first_choice(await self._client.post("/completions", body), self.name)
        tokens = choice.get("token_ids")
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(tokens, list) or not isinstance(logprobs, list) or len(tokens) != len(logprobs):
            raise EngineError(f"{self.name}: {self._client.host} returns no token ids with log-probs")
        return Sample(request.prompt_ids, tuple(tokens), tuple(logprobs), str(choice.get("finish_reason")), 0)

    async def publish(self, version: int, write: Callable[[Mapping[str, Tensor]], None]) -> None:
        raise EngineError(f"{self.name}: an endpoint serves its own weights; it takes none")

    async def close(self) -> None:
        self._client.close()


def request_body(model: str, sampling: Sampling, seed: int) -> dict[str, Any]:
    return {
        "model": model,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        # servers read seeds as signed 32-bit or 64-bit numbers; the smaller fits both
        "seed": seed & 0x7FFFFFFF,
    }


def first_choice(answer: Any, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first choice and the whole answer; EngineError if it is not of the protocol's shape."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise EngineError(f"{name}: the answer has no choices")
    return choices[0], answer


def text_of(choice: Mapping[str, Any], chat: bool, name: str) -> str:
    """What a choice says; EngineError if it is not of the protocol's shape.

    A null content is no failure where the answer never began (cut off, or all of it reasoning that the server keeps
    apart): it is "". A refusal in a field of its own is the answer.
    """
    message = choice.get("message") if chat else choice
    text = message.get("content" if chat else "text") if isinstance(message, dict) else None
    if isinstance(message, dict) and chat and text is None and "content" in message:
        if isinstance(message.get("refusal"), str):
            text = message["refusal"]
        elif choice.get("finish_reason") == "length" or message.get("reasoning_content") or message.get("reasoning"):
            text = ""
    if not isinstance(text, str):
        raise EngineError(f"{name}: the answer has no text")
    return text


def _usage(answer: Mapping[str, Any], *path: str) -> Any:
    """What the answer's usage says under `path`, None where the server does not tell."""
    value: Any = answer.get("usage")
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _count(answer: Mapping[str, Any], name: str) -> int:
    value = _usage(answer, name)
    return value if isinstance(value, int) else 0


def completion_tokens(answer: Mapping[str, Any]) -> int:
    return _count(answer, "completion_tokens")
