"""scripts/bench-gpu.sh with a stand-in for Python: which parts run, and that one that fails stops no other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench-gpu.sh"
STAND_IN = """#!/bin/sh
case "$*" in
  *is_available*) exit $SEES ;;
  *"bench publish"*) echo "asked: $*"; exit 3 ;;
esac
echo "asked: $*"
"""


def bench(tmp_path, *parts, sees=0):
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "SEES": str(sees)}
    done = subprocess.run([SCRIPT, *parts], capture_output=True, text=True, check=False, env=environment)
    return done, [line.removeprefix("asked: ") for line in done.stdout.splitlines() if line.startswith("asked: ")]


def test_every_part_runs_though_one_fails(tmp_path):
    done, asked = bench(tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["bench-gpu: failed: publish (exit code 3)"]
    words = [line.split()[2] for line in asked[1:]]
    assert words == ["tests/kernels", "kernels", "ema", "publish", "step", "step"]


def test_the_parts_asked_for(tmp_path):
    done, asked = bench(tmp_path, "ema", "step-7b")
    assert done.returncode == 0, done.stderr
    assert [line.split()[2] for line in asked[1:]] == ["ema", "step"]
    assert "--size 7b" in asked[-1]


def test_a_part_that_does_not_exist(tmp_path):
    done, asked = bench(tmp_path, "ema", "step7b")
    assert (done.returncode, asked) == (2, [])
    assert "no part step7b; there are: check kernels" in done.stderr


def test_without_a_gpu_nothing_runs(tmp_path):
    done, asked = bench(tmp_path, sees=1)
    assert (done.returncode, asked) == (2, [])
    assert "set PYTHON to one that does" in done.stderr


@pytest.mark.slow
def test_the_benchmarks_know_their_options():
    """The lines of the script, each with --help."""
    lines = [line.split('"$python" ')[1] for line in SCRIPT.read_text().splitlines() if '"$python" -m bench' in line]
    assert len(lines) == 5
    for line in lines:
        done = subprocess.run([sys.executable, *line.split(), "--help"], capture_output=True, text=True, check=False,
                              cwd=SCRIPT.parents[1])  # fmt: skip
        assert done.returncode == 0, done.stderr
