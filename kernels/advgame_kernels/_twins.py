"""Reference twins: they take every keyword of the function that they stand beside, which alone spells them out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

T = TypeVar("T")


def twin_of(function: Callable[..., T]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Give a reference the signature of `function`: it is called with all arguments by name, defaults filled in."""
    signature = inspect.signature(function)

    def decorate(reference: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(reference)
        def call(*args: Any, **kwargs: Any) -> T:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return reference(**bound.arguments)

        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate


def pick(kind: Callable[..., T], settings: dict[str, Any]) -> T:
    """A dataclass from those of the settings that are its fields."""
    names = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    return kind(**{k: v for k, v in settings.items() if k in names})
