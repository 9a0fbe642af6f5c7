"""Variables of this process's environment for a while: what is started meanwhile inherits them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(eq=False)
class _Use:
    """One value of a variable, and the threads that are inside with it (once for each time)."""

    value: str
    before: str | None
    threads: list[int] = field(default_factory=list)


_changed = threading.Condition()
_uses: dict[str, list[_Use]] = {}
"""By variable; more than one only where a thread wants another value inside its own use."""


@contextmanager
def variables(wanted: Mapping[str, str]) -> Iterator[None]:
    """Inside, the environment says `wanted`; afterwards, of these names, what it said before.

    The environment is the whole process's. Threads that want the same value of a variable share it, and the last one
    to leave puts back what was there; who wants another value waits for them. All names are taken at once, so that
    nobody waits while it holds others, unless it is inside an outer use.
    """
    taken: list[tuple[str, _Use]] = []
    me = threading.get_ident()
    try:
        with _changed:
            _changed.wait_for(lambda: all(_free(name, value, me) for name, value in wanted.items()))
            for name, value in wanted.items():
                taken.append((name, _take(name, value, me)))
        yield
    finally:
        with _changed:
            for name, use in taken:
                _leave(name, use, me)
            _changed.notify_all()


def _free(name: str, value: str, me: int) -> bool:
    """Whether nobody else is inside with another value."""
    uses = _uses.get(name, [])
    return all(use.value == value for use in uses) or all({me} >= set(use.threads) for use in uses)


def _take(name: str, value: str, me: int) -> _Use:
    uses = _uses.get(name, [])
    if not uses or uses[-1].value != value:
        before = os.environ.get(name)
        os.environ[name] = value  # may refuse it
        uses.append(_Use(value, before))
        _uses[name] = uses
    uses[-1].threads.append(me)
    return uses[-1]


def _leave(name: str, use: _Use, me: int) -> None:
    use.threads.remove(me)
    uses = _uses.get(name, [])
    if use.threads or use not in uses:  # the latter in a fork made inside
        return
    at = uses.index(use)
    del uses[at]
    if at < len(uses):  # left before one that began inside it
        uses[at].before = use.before
    elif use.before is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = use.before
    if not uses:
        del _uses[name]


def _after_fork() -> None:
    """In a child, which has none of those threads, and perhaps a lock that one of them held."""
    global _changed
    _changed = threading.Condition()
    _uses.clear()


os.register_at_fork(after_in_child=_after_fork)
