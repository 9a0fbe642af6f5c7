"""What a run was started with: code version, library versions, machine, command line."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import advgame

PACKAGES = ("torch", "transformers", "triton", "safetensors", "numpy", "vllm", "deepspeed", "ray")

_SECRET = re.compile(r"(?i)([\w.-]*(?:api[_-]?key|password|secret|hf[_-]?token)[\w.-]*)(=|$)")


def describe_environment(argv: list[str] | None = None) -> dict[str, Any]:
    """Facts for `environment.json`; what cannot be known is null. `argv` defaults to this process's.

    Values of options that look like credentials are masked, since run folders are meant to be shared.
    """
    commit, dirty = code_state()
    return {
        "git_commit": commit,
        "git_dirty": dirty,
        "python": platform.python_version(),
        "advgame": advgame.__version__,
        **{name: package_version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "hostname": platform.node(),
        "cpu_count": os.cpu_count(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "pid": os.getpid(),
        "argv": mask_secrets(sys.argv if argv is None else argv),
    }


@functools.cache
def code_state() -> tuple[str | None, bool | None]:
    """`git_state` of this package when it was first asked for in this process, or in the one it was forked from."""
    return git_state(Path(advgame.__file__).parent)


def git_state(package: Path, *pathspec: str) -> tuple[str | None, bool | None]:
    """(commit, has uncommitted changes) of the repository that tracks `package`; Nones where there is none.

    An installed copy may lie inside a repository that knows nothing of it (a virtual environment in some
    project): that repository's commit would be a false statement, hence the check that the package itself is
    tracked. pathspec: what changes are looked for in; the whole repository without it.
    """
    if not _git(package, "ls-files", "--", "__init__.py"):
        return None, None
    status = _git(package, "status", "--porcelain", "--untracked-files=normal", *pathspec)
    return _git(package, "rev-parse", "--verify", "HEAD"), None if status is None else bool(status)


def mask_secrets(argv: list[str]) -> list[str]:
    """`argv` with the values of credential-like options replaced by `***`."""
    masked: list[str] = []
    hide_next = False
    for word in argv:
        match = _SECRET.match(word)
        if hide_next and not word.startswith("--"):
            masked.append("***")
            hide_next = False
        elif match is not None and match.group(2):
            masked.append(f"{match.group(1)}=***")
        else:
            masked.append(word)
            hide_next = match is not None and word.startswith("-")
    return masked


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def package_version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
