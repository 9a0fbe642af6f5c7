"""Shared settings of all tests: helpers beside the tests are importable, torch runs on one thread.

Without a GPU, Triton kernels run in Triton's interpreter; that is decided here, before any test imports them. All
workers of a session share one cache of the tiny world's players, made by whoever needs them first.
"""

import asyncio
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent))

SPREAD = ("run/test_world_runs.py", "kernels/")
"""Tests that share nothing within their file; the others stay with one worker, for their files' engines and models."""


def pytest_configure(config):
    if not hasattr(config, "workerinput") and "ADVGAME_CACHE" not in os.environ:
        os.environ["ADVGAME_CACHE"] = config.advgame_cache = tempfile.mkdtemp(prefix="advgame-tests-")


def pytest_unconfigure(config):
    if folder := getattr(config, "advgame_cache", None):
        shutil.rmtree(folder, ignore_errors=True)
        del os.environ["ADVGAME_CACHE"]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests to one worker. xdist's own groups write into a test's id, which pytest 9.2 no longer lets them."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return nodeid if nodeid.removeprefix("tests/").startswith(SPREAD) else nodeid.partition("::")[0]

    config.option.loadscopereorder = False  # which would put files of few tests last, the longest of all
    return ByFile(config, log)


def pytest_collection_modifyitems(items):
    """Files with slow tests first, so that no worker is left with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module")
def runner():
    """One event loop for a file's engines."""
    with asyncio.Runner() as made:
        yield made
