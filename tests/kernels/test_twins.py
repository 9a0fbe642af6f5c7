"""A reference takes every argument that its function takes."""

from __future__ import annotations

import inspect

import advgame_kernels as ak
import pytest
import torch
from problems import head_problem

NAMES = sorted(n for n in ak.__all__ if f"{n}_ref" in ak.__all__ or f"{n}ref_" in ak.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_the_same(name):
    twin = f"{name}_ref" if f"{name}_ref" in ak.__all__ else f"{name}ref_"
    own, reference = (inspect.signature(getattr(ak, n)).parameters for n in (name, twin))
    assert list(own) == list(reference)
    assert [p.default for p in own.values()] == [p.default for p in reference.values()]


def test_every_function_has_one():
    assert len(NAMES) == 8


def test_settings_of_the_other_one_change_nothing():
    p = head_problem([5, 3, 2, 4])
    args = (p.hidden, p.weight, p.labels, p.bounds, p.ref_logps)
    plain = ak.linear_preference_loss_ref(*args)
    told = ak.linear_preference_loss_ref(*args, chunk_bytes=1, skip_below=0.5, impl="torch", process_group=None)
    assert torch.equal(plain.loss, told.loss)
    with pytest.raises(TypeError, match="bta"):
        ak.linear_preference_loss_ref(*args, bta=0.1)
