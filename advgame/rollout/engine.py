"""The engine protocol: token ids and sampling settings in, tokens with untempered log-probs out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from advgame.game.tree import Sample
from advgame.rollout.first_token import FirstToken

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How to sample. `max_tokens` counts the closing token; temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256


@dataclass(frozen=True)
class Request:
    """One completion to make. `key` orders requests in deterministic batches, `seed` is its random stream.

    stop: texts that end the completion, with finish reason "stop", by the token that completes one of them (that
    token is the sample's last). They are looked for in what was sampled, never in the prompt.
    """

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    key: tuple[int, ...]
    seed: int
    stop: tuple[str, ...] = ()


class EngineError(RuntimeError):
    """An engine could not answer; the caller retries and counts it."""


class EngineUnwell(EngineError):
    """No answer in time, or one that cannot be used: it counts against the engine."""


class EngineDied(EngineError):
    """An engine's process is gone or was given up; the next request restarts it at the current version."""


class Engine(Protocol):
    """Samples one model. `version` is that of the weights that are served now."""

    first_token: FirstToken

    @property
    def version(self) -> int: ...

    async def start(self) -> None:
        """Makes the engine ready; whoever does not call it pays at the first request."""

    async def generate(self, request: Request) -> Sample: ...

    async def publish(self, version: int, write: Callable[[Mapping[str, Tensor]], None]) -> None:
        """Quiesce, let `write` put new weights into the engine's own tensors (by parameter name), stamp them."""

    async def close(self) -> None: ...


def stream_seed(run_seed: int, key: tuple[int, ...]) -> int:
    """A 63-bit seed that depends on the run's seed and on `key` alone (blake2b, so stable across machines)."""
    text = ",".join(map(str, (run_seed, *key)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def end_of_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop text ends that is complete first; None if `text` holds none."""
    return min((at + len(word) for word in stop if (at := text.find(word)) >= 0), default=None)
