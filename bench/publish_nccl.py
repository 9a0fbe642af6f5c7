"""Publishing to another GPU by NCCL, for `python -m bench publish --device cuda` where two are visible.

A second process on the second GPU receives: our buckets in the plan's order, into which the average's kernel writes and
from which the receiver makes the plan's copies; and, where vLLM is, a new state dict through vLLM's packed NCCL
broadcast, whose loader is a plain copy here. The same runs on the CPU by gloo, without vLLM, as a test. Written without
a GPU at hand.
"""

from __future__ import annotations

import importlib
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

import torch
from advgame_kernels import PreparedEma

from advgame.publish import group as groups
from advgame.publish.buckets import Layout, Unpacker, layout_of
from advgame.publish.plan import Plan

DECAY = 0.95
SECONDS = 120.0
HOST = "127.0.0.1"


def vllm_packing() -> Any:
    """vLLM's packed NCCL broadcast; None without vLLM, or in a version that has none."""
    try:
        packing = importlib.import_module("vllm.distributed.weight_transfer.packed_tensor")
    except ImportError:
        return None
    return packing if hasattr(packing, "packed_nccl_broadcast_producer") else None


def vllm_group(port: int, rank: int, device: torch.device) -> Any:
    """vLLM's own communicator of both processes."""
    utils = importlib.import_module("vllm.distributed.utils")
    pynccl = importlib.import_module("vllm.distributed.device_communicators.pynccl")
    return pynccl.PyNcclCommunicator(utils.StatelessProcessGroup.create(HOST, port, rank, 2), device=device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def total(tensors: Mapping[str, torch.Tensor]) -> float:
    return math.fsum(float(tensor.double().sum()) for tensor in tensors.values())


def receiver(
    plan: Plan, layout: Layout, port: int, vllm_port: int, buffer_bytes: int, kind: str, link: Connection
) -> None:
    """The second process: receives what it is told to, and answers when all of it is in its place."""
    device = torch.device(kind, 1) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    group = groups.join(
        groups.reach(HOST, port, SECONDS), "bench", 1, 2, device=device, host=HOST, seconds=SECONDS
    )  # fmt: skip
    theirs, packing = (vllm_group(vllm_port, 1, device), vllm_packing()) if vllm_port else (None, None)
    flats = {s.name: torch.zeros(s.elements, dtype=getattr(torch, s.dtype), device=device) for s in plan.storages}
    unpacker = Unpacker(layout, plan, flats, device)
    link.send("ready")
    while (request := link.recv()) is not None:
        if request == "sum":
            link.send(total(flats))
            continue
        if request == "ours":
            for number in range(len(layout.bounds) - 1):
                groups.broadcast(group, unpacker.bucket(number), SECONDS)
                unpacker.unpack(number)
        else:
            wanted = iter([(s.name, (list(s.shape), torch.bfloat16)) for s in plan.sources])

            def place(found: list[tuple[str, torch.Tensor]]) -> None:
                for name, tensor in found:
                    flats[name].copy_(tensor.flatten())

            packing.packed_nccl_broadcast_consumer(
                wanted, theirs, 0, place, buffer_size_bytes=buffer_bytes, device=device
            )
        synchronize(device)
        link.send("received")
    groups.leave(group)


def measure(model: str, plan: Plan, rounds: int, kind: str = "cuda", bucket_bytes: int = 256 << 20) -> dict[str, Any]:
    """Prints the table of one model's shapes; returns its medians in milliseconds."""
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    packing = vllm_packing() if kind == "cuda" else None
    store = groups.open_store(HOST, 0)
    vllm_port = groups._bound(HOST, 0)[0] if packing is not None else 0
    shadow = {s.name: torch.zeros(s.shape, device=device) for s in plan.sources}
    live = {s.name: torch.rand(s.shape, device=device) for s in plan.sources}
    buffer_bytes = max(1 << 30, *(2 * t.numel() for t in shadow.values()))  # vLLM's default, or what the largest needs
    layout = layout_of([plan], bucket_bytes)
    context = torch.multiprocessing.get_context("spawn")
    link, other = context.Pipe()
    arguments = (plan, layout, store.port, vllm_port, buffer_bytes, kind, other)
    process = context.Process(target=receiver, args=arguments, daemon=True)
    process.start()
    group = groups.join(store, "bench", 0, 2, device=device, host=HOST, seconds=SECONDS)
    theirs = vllm_group(vllm_port, 0, device) if packing is not None else None
    link.recv()
    buffer = torch.zeros(layout.bounds[-1], dtype=torch.uint8, device=device)
    served = {one.name: one.of(buffer).view(one.shape) for one in layout.packed}
    ema = PreparedEma(list(shadow.values()), list(live.values()), [served[name] for name in shadow])

    def ours() -> None:
        ema(DECAY)
        for begin, end in pairwise(layout.bounds):
            groups.broadcast(group, buffer[begin:end], SECONDS)

    def vllm() -> None:
        state = {name: DECAY * shadow[name] + (1 - DECAY) * live[name] for name in shadow}
        for name, tensor in state.items():
            shadow[name].copy_(tensor)
        narrow: Iterator[tuple[str, torch.Tensor]] = ((n, t.to(torch.bfloat16)) for n, t in state.items())
        packing.packed_nccl_broadcast_producer(narrow, theirs, 0, lambda item: item[1], buffer_size_bytes=buffer_bytes)

    contenders = {"ours": ours} | ({} if packing is None else {"vllm": vllm})
    names = {"ours": "buckets in the plan's order", "vllm": "state dict, vLLM's packed broadcast"}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 2):
        for name, run in contenders.items():
            synchronize(device)
            start = time.perf_counter()
            link.send(name)
            run()
            synchronize(device)
            link.recv()
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    link.send("ours")
    ours()
    link.recv()
    link.send("sum")
    if not math.isclose(link.recv(), total(served), rel_tol=1e-9):
        raise RuntimeError("the other process does not hold what was sent")
    link.send(None)
    process.join()
    groups.leave(group)
    print(f"\n{model} to another {'GPU by NCCL' if kind == 'cuda' else 'process by gloo'}, average included")
    medians = {names[name]: statistics.median(taken) for name, taken in times.items()}
    for name, median in medians.items():
        print(f"  {name:36}{median:10.2f} ms")
    if packing is None:
        print("  vLLM's packed broadcast: left out (no vLLM with it here)")
    return {"publish_ms": medians, "all_ms": {names[name]: taken for name, taken in times.items()}}
