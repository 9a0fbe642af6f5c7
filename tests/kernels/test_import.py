"""The package imports and works with torch alone: no Triton, no extension."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
sys.modules["triton"] = None
sys.modules["advgame_kernels._native"] = None
import torch
import advgame_kernels as ak
from advgame_kernels import modules, native, passes, patch
assert not native.available() and "not installed" in passes.triton_reason()
hidden = torch.randn(6, 4, requires_grad=True)
weight = torch.randn(9, 4, requires_grad=True)
labels = torch.arange(6)
ak.linear_preference_loss(hidden, weight, labels, [0, 2, 6], torch.zeros(2)).loss.backward()
ak.linear_policy_loss(hidden, weight, labels, torch.ones(6), torch.ones(6)).loss.backward()
ak.selective_logprobs(torch.randn(3, 5), torch.tensor([0, 1, 4]))
ak.ema_update_([torch.zeros(3)], [torch.ones(3)], 0.5)
for impl, reason in (("native", "not available"), ("triton", "not installed")):
    try:
        ak.selective_logprobs(torch.randn(3, 5), torch.tensor([0, 1, 4]), impl=impl)
    except RuntimeError as error:
        assert reason in str(error), error
    else:
        raise AssertionError(impl)
loaded = {m.split(".")[0] for m in sys.modules}
assert not loaded & {"advgame", "transformers", "trl", "deepspeed"}, loaded
"""


def test_torch_is_enough():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
