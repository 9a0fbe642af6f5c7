"""The examples run, and say what is true."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_plain_loop_learns_its_preference():
    losses = load("plain_loop").main(steps=40)
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # the reference is the model itself
    assert losses[-1] < 0.5


def test_patched_model_gives_the_loss_of_its_logits():
    pytest.importorskip("transformers")
    fused, whole = load("huggingface_patch").main()
    assert fused == pytest.approx(whole, abs=1e-5)


@pytest.mark.slow
def test_trl_trainer_with_three_gemms_follows_the_stock_one(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed")
    example = load("trl_dpo")
    theirs = example.losses(str(tmp_path / "theirs"), False)
    ours = example.losses(str(tmp_path / "ours"), True)
    assert len(theirs) == len(ours) == 6
    assert theirs[-1] < theirs[0] - 0.05  # it learns: equal losses of a model that stands still would say little
    for a, b in zip(theirs, ours, strict=True):
        assert b == pytest.approx(a, abs=1e-4)
