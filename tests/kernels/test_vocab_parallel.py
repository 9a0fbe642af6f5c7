"""A vocabulary split over two ranks gives the loss and gradients of the whole head."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import advgame_kernels as ak
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from problems import grads_of, head_problem

LENGTHS = [5, 3, 0, 1, 12, 7]
VOCAB = 38


def compare(rank: int, impl: str, fn: Any, whole: tuple, shard: tuple, *args: Any, **settings: Any) -> None:
    hidden, weight, bias = whole
    want = fn(hidden, weight, *args, bias=bias, **settings)
    mine = slice(rank * VOCAB // 2, (rank + 1) * VOCAB // 2)
    local_w, local_b = weight.detach()[mine].clone().requires_grad_(), bias.detach()[mine].clone().requires_grad_()
    got = fn(hidden, local_w, *args, bias=local_b, **settings, impl=impl, process_group=dist.group.WORLD)
    close = {"rtol": 1e-5, "atol": 1e-5} if hidden.dtype == torch.float32 else {}
    for name, a, b in zip(got._fields, got, want, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}", **close)
    scalar, exact = (
        o.loss if hasattr(o, "loss") else (o.logps + 0.3 * o.entropy + 0.1 * o.lse).sum() for o in (got, want)
    )
    full = grads_of(exact, hidden, weight, bias)
    twin = getattr(ak, f"{fn.__name__}_ref")(
        hidden, local_w, *args, bias=local_b, **settings, process_group=dist.group.WORLD
    )
    torch.testing.assert_close(twin[0], want[0], **close)
    if hasattr(twin, "loss"):
        for a, b in zip(grads_of(twin.loss, hidden, local_w), (full[0], full[1][mine]), strict=True):
            torch.testing.assert_close(a, b, **close)
    for a, b in zip(grads_of(scalar, hidden, local_w, local_b), (full[0], full[1][mine], full[2][mine]), strict=True):
        torch.testing.assert_close(a, b, **close)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for dtype, impl in ((torch.float64, "torch"), (torch.float32, "auto")):
        p = head_problem(LENGTHS, vocab=VOCAB).to(dtype)
        whole = (p.hidden, p.weight, p.bias)
        extras = {"softcap": 4.0, "temperature": 0.7, "chunk_bytes": 10 * VOCAB * 8}
        compare(
            rank,
            impl,
            ak.linear_preference_loss,
            whole,
            (),
            p.labels,
            p.bounds,
            p.ref_logps,
            entropy_weight=0.2,
            **extras,
        )
        compare(rank, impl, ak.linear_logprobs, whole, (), p.labels, **extras)
        ones = torch.ones(len(p.labels), dtype=dtype)
        compare(rank, impl, ak.linear_policy_loss, whole, (), p.labels, ones, ones, entropy_weight=0.1, **extras)
    masked = p.bias.detach().clone()
    masked[VOCAB // 2 :] = float("-inf")  # the second rank has nothing to say
    labels = p.labels % (VOCAB // 2)
    want = ak.linear_logprobs(p.hidden, p.weight, labels, bias=masked)
    mine = slice(rank * VOCAB // 2, (rank + 1) * VOCAB // 2)
    got = ak.linear_logprobs(p.hidden, p.weight[mine], labels, bias=masked[mine], process_group=dist.group.WORLD)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=rf"labels: expected ids in \[0, {VOCAB}\)"):
        ak.linear_logprobs(p.hidden, p.weight[mine], p.labels + VOCAB, process_group=dist.group.WORLD)
    uneven = p.weight[:18] if rank == 0 else p.weight[18:]
    with pytest.raises(ValueError, match=r"weight: expected as many vocabulary rows on every rank, got \[18, 20\]"):
        ak.linear_logprobs(p.hidden, uneven, labels, process_group=dist.group.WORLD)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_against_the_whole_head():
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (folder,), nprocs=2)
