"""Every Triton kernel compiles for Hopper without a GPU and spills nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
def test_no_kernel_spills_on_sm90():
    # A process of its own: in this one the kernels are interpreted, and the interpreter's functions do not compile.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "advgame_kernels.aot"], capture_output=True, text=True, env=environment, check=False
    )
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(reports) >= 13
    for report in reports:
        assert report["spills"] == 0, report
        assert report["registers"] <= 128, report  # two programs of eight warps stay resident on an SM
