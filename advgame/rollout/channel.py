"""What an engine needs of whoever brings it weights, and the times of the parts of one publish."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, Protocol

from torch import Tensor

from advgame.rollout.engine import EngineDied

Write = Callable[[Mapping[str, Tensor]], None]
"""Fills an engine's tensors, by parameter name."""


class Channel(Protocol):
    """The way of new weights into one engine. `direct`: they are written where the engine reads."""

    @property
    def direct(self) -> bool: ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of this channel, after `attach`."""

    @property
    def destinations(self) -> Mapping[str, Tensor]:
        """Where the trainer writes, by parameter name; valid after `attach`."""

    def prepare(self) -> Mapping[str, str]:
        """Called before an engine starts; returns what its processes must find in their environment."""

    async def attach(self, llm: Any) -> None:
        """Connects to a freshly started engine, dropping a former one."""

    def turn(self) -> AbstractAsyncContextManager[None]:
        """Held from before a write to the end of its delivery, where channels share who sends."""

    def expect(self, *, verify: bool) -> None:
        """Before a write: whether its delivery will be verified, so that the write may take the checksums."""

    async def deliver(self, llm: Any, *, verify: bool) -> None:
        """After a write and before the engine runs again: whatever is left until it reads the new weights."""

    def close(self) -> None: ...


class NoTurns:
    """For a channel that shares nothing with others, and takes its checksums itself."""

    def turn(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    def expect(self, *, verify: bool) -> None:
        """Nothing to prepare."""


class WriteFailed(Exception):
    """The caller's `write` raised `error`."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


def written_into(channel: Channel, write: Write, *, verify: bool) -> None:
    """Raises WriteFailed with whatever `write` raises."""
    channel.expect(verify=verify)
    try:
        write(channel.destinations)
    except Exception as error:
        raise WriteFailed(error) from error


class PublishFailed(EngineDied):
    """An engine was killed in a publish; `written`: after the caller's `write` had run."""

    def __init__(self, message: str, written: bool):
        super().__init__(message)
        self.written = written


@dataclass(frozen=True)
class PublishTimes:
    """Seconds of each part of one publish, in order."""

    quiesce: float = 0.0
    write: float = 0.0
    deliver: float = 0.0
    reset: float = 0.0
    stamp: float = 0.0
    resume: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))
