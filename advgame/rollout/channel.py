"""What an engine needs of whoever brings it weights, and the times of the parts of one publish."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

from torch import Tensor

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

    async def deliver(self, llm: Any, *, verify: bool) -> None:
        """After a write and before the engine runs again: whatever is left until it reads the new weights."""

    def close(self) -> None: ...


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
