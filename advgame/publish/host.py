"""The C++ extension of publishing, `advgame.publish._host` (csrc/host/), which may not have been built.

It knows addresses, sizes and strides, nothing of torch, and needs nothing of CUDA to be built: the CUDA runtime is
found when it is first asked for, torch's own before the system's.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from advgame.errors import InputError

FIELD = "rollout.vllm.transport"

try:
    _host: Any = importlib.import_module("advgame.publish._host")
    _why_not = ""
except ImportError as error:
    _host = None
    _why_not = str(error)


def missing() -> str | None:
    """Why the extension is not there, or None."""
    return None if _host is not None else f"the C++ extension of publishing is not there ({_why_not})"


def require(transport: str) -> Any:
    """The extension. InputError if it is not there: `transport` writes through it."""
    if reason := missing():
        raise InputError(
            f"{FIELD}: {transport} cannot be used, {reason}; install gcc, then: pip install -e . (or set loader)"
        )
    return _host


@functools.cache
def cuda() -> Any:
    """The CUDA runtime of this process. InputError: there is none."""
    try:
        return require("ipc").Runtime()
    except RuntimeError as error:
        raise InputError(
            f"{FIELD}: ipc cannot be used, {error}; install a CUDA build of torch (or set loader)"
        ) from error
