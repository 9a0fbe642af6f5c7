"""Every Triton kernel compiles for Hopper without a GPU and spills nothing, under the Triton that is installed and
under the oldest one that the package names, which is what GPU machines with torch 2.11 have."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("triton")

UNREACHABLE = re.compile(r"Retrying|ConnectionError|NameResolutionError|Network is unreachable|ProxyError|timed? ?out")


def oldest() -> str:
    """The lower bound on Triton in pyproject.toml, as a full version."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    found = [re.match(r"triton>=([\d.]+)", d) for d in project["dependencies"]]
    (bound,) = [m.group(1) for m in found if m]
    return bound if bound.count(".") == 2 else f"{bound}.0"


@pytest.fixture
def old_triton(request: pytest.FixtureRequest) -> Path:
    """A folder with nothing but the oldest Triton, made once in pytest's cache."""
    version = oldest()
    folder = request.config.cache.mkdir("triton") / version
    if not folder.is_dir():
        part = folder.with_suffix(f".part{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(part), f"triton=={version}"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            shutil.rmtree(part, ignore_errors=True)
            said = run.stdout + run.stderr
            assert UNREACHABLE.search(said), said[-2000:]
            pytest.skip(f"the package index cannot be reached: {said.strip().splitlines()[-1]}")
        part.rename(folder)
    return folder


def check(first_on_path: Path | None) -> str:
    """Compile everything in a process of its own; returns the version of Triton that did it."""
    # Not in this one: here the kernels are interpreted, and the interpreter's functions do not compile.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if first_on_path is not None:
        paths = [str(first_on_path), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    program = "import sys, triton; print(triton.__version__, file=sys.stderr); from advgame_kernels import aot; "
    run = subprocess.run(
        [sys.executable, "-c", program + "sys.argv = ['aot']; sys.exit(aot.main())"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(reports) >= 13
    for report in reports:
        assert report["spills"] == 0, report
        assert report["registers"] <= 128, report  # two programs of eight warps stay resident on an SM
    return run.stderr.splitlines()[0]


def test_there_are_no_cuda_sources():
    """GPU passes are Triton, products cuBLAS: nothing for nvcc. Whoever adds a .cu file adds its compile for sm_90."""
    root = Path(__file__).parents[2]
    found = [p for folder in ("csrc", "kernels", "advgame", "bench") for p in (root / folder).rglob("*.cu*")]
    assert found == []


@pytest.mark.slow
def test_no_kernel_spills_on_sm90():
    check(None)


@pytest.mark.slow
def test_no_kernel_spills_on_sm90_under_the_oldest_triton(old_triton):
    assert check(old_triton) == oldest()
