"""Where results lie, what machine, versions and commit they name, and why a contender is not among them."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from advgame.run.environment import git_state, package_version

RESULTS = Path(__file__).parent / "results"
CODE = git_state(Path(__file__).parent, ":(top)", ":(top,exclude)bench/results")
"""When the process began: a benchmark may take an hour. Results of others before it are no change."""
PACKAGES = (
    "torch", "triton", "transformers", "vllm", "deepspeed", "ray", "liger-kernel", "trl", "quack-kernels",
    "cut-cross-entropy",
)  # fmt: skip


def device_name(device: torch.device) -> str:
    """The accelerator's or the processor's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found.group(1).strip() if found else platform.processor() or "cpu"


def today() -> str:
    """The date of a result, in UTC."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def save(result: Mapping[str, Any], name: str, folder: Path | None = None) -> Path:
    """Writes <folder>/<name>-<date>.json (bench/results by default); prints and returns where."""
    folder = RESULTS if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    return write(result, folder / f"{name}-{today()}.json")


def made_with() -> dict[str, Any]:
    """The commit ("+": with changes; a copy without its history names it in $ADVGAME_COMMIT), Python, and the versions
    of those of PACKAGES that are there."""
    commit, changed = CODE
    found = {"commit": os.environ.get("ADVGAME_COMMIT") if commit is None else commit + ("+" if changed else "")}
    found["python"] = platform.python_version()
    return found | {name: version for name in PACKAGES if (version := package_version(name)) is not None}


def write(result: Mapping[str, Any], path: Path) -> Path:
    """Writes `path` as JSON, `made_with` included; prints and returns it."""
    path.write_text(json.dumps({**result, "made_with": made_with()}, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path.name}")
    return path


def reason(error: Exception) -> str:
    """Why a contender could not run, in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
