"""A model whose LM head DeepSpeed's ZeRO-3 has partitioned trains as the whole one does."""

from __future__ import annotations

import importlib.util
import os
import socket
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from advgame_kernels.patch import patch_model
from test_modules_and_patch import batch, tiny_model


def gradients(model: Any, call: Any, backward: Any, read: Any) -> dict[str, torch.Tensor]:
    backward(call())
    return {n: read(p).detach().clone() for n, p in model.named_parameters()}


def worker(rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    import deepspeed

    ids, labels = batch()
    ref = torch.tensor([-20.0, -10.0, -21.0, -8.0])
    calls = {
        "preference": lambda m: m(input_ids=ids, labels=labels, fused="preference", ref_logps=ref, beta=0.5).loss,
        "logprobs": lambda m: m(input_ids=ids, labels=labels, fused="logprobs").logps.sum(),
    }
    for call in calls.values():
        plain = patch_model(tiny_model())
        want = gradients(plain, lambda m=plain, call=call: call(m), lambda x: x.backward(), lambda p: p.grad)
        settings = {
            "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3}, "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": 0.0}}, "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }  # fmt: skip
        model = patch_model(tiny_model())
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=settings, dist_init_required=True
        )
        got = gradients(
            engine.module, lambda e=engine, call=call: call(e), engine.backward, deepspeed.utils.safe_get_full_grad
        )
        for name, grad in want.items():
            torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        engine.destroy()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_two_ranks_against_the_whole_model():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port,), nprocs=2)
