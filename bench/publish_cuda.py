"""Publishing on one GPU into memory that a second process holds open: `python -m bench publish --device cuda`.

The second process stands for the engine: it opens the trainer's memory over CUDA IPC, as vLLM's worker does, and checks
what arrives. vLLM itself is not needed; where it is, its own packed IPC transfer runs beside ours. Where a second GPU
is visible, transfers by NCCL follow (publish_nccl.py). Written without a GPU at hand.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.multiprocessing import reductions

from advgame.publish.arena import checksum
from advgame.publish.capture import PublishPass
from advgame.publish.cuda_memory import CudaMemory, device_id, open_shared
from advgame.publish.destinations import Destinations
from advgame.publish.plan import Copy, Plan, Region, Source, Storage
from bench.floors import copy_bandwidth
from bench.records import device_name
from bench.shapes import named_shapes

DECAY = 0.95
BYTES_PER_PARAMETER = 14
MARK = 1.15
"""Most times bytes / copy bandwidth that average and publish shall take together."""


def plan_of(model: str) -> Plan:
    """A plan in which every source is one whole storage in bfloat16."""
    sources, storages, copies = [], [], []
    for name, shape in named_shapes(model).items():
        flat = torch.empty(shape, device="meta")
        whole = Region(0, tuple(flat.shape), flat.stride())
        sources.append(Source(name, shape))
        storages.append(Storage(name, "bfloat16", flat.numel(), (name,)))
        copies.append(Copy(name, whole, name, whole))
    return Plan(model, 0, 1, tuple(sources), tuple(storages), tuple(copies), ())


def holder(memory: Mapping[str, Any], link: Connection) -> None:
    """The second process: answers with the checksum of the memory, or copies a tensor whose handle it is sent."""
    device = torch.device("cuda", torch.cuda.current_device())
    part, own = open_shared(memory, device), dict[str, torch.Tensor]()
    unpack = vllm_consumer(device)
    link.send("open")
    while (request := link.recv()) is not None:
        if request == "checksum":
            link.send(checksum(part))
            continue
        if isinstance(request, dict):  # a packed chunk of vLLM's
            for name, tensor in unpack(request):
                own.setdefault(name, torch.empty_like(tensor)).copy_(tensor)
            torch.cuda.synchronize()
            link.send("copied")
            continue
        number, (rebuild, arguments) = request
        tensor = rebuild(*arguments)
        own.setdefault(number, torch.empty_like(tensor)).copy_(tensor)
        torch.cuda.synchronize()
        del tensor
        link.send("copied")


def vllm_producer() -> Any:
    """vLLM's own packing of tensors into one IPC buffer; None without vLLM, or in a version that has none."""
    try:
        return importlib.import_module("vllm.distributed.weight_transfer.packed_tensor").packed_ipc_producer
    except (ImportError, AttributeError):
        return None


def vllm_consumer(device: torch.device) -> Callable[[dict[str, Any]], list[tuple[str, torch.Tensor]]]:
    """The receiving end, as vLLM's IPC engine holds it: what a chunk unpacks to, before any loader."""
    if vllm_producer() is None:
        return lambda chunk: []
    packed = importlib.import_module("vllm.distributed.weight_transfer.packed_tensor")
    # one importer for all chunks of a transfer, in the versions that have one
    importer = getattr(packed, "PackedBufferImporter", None)
    more = {} if importer is None else {"importer": importer()}

    def unpack(chunk: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
        found: list[tuple[str, torch.Tensor]] = packed.packed_ipc_consumer(**chunk, device_index=device.index, **more)
        return found

    return unpack


def measure(model: str, rounds: int) -> dict[str, Any]:
    """Prints the table of one model's shapes; returns its numbers in milliseconds."""
    device = torch.device("cuda", torch.cuda.current_device())
    plan, memory = plan_of(model), CudaMemory()
    handle = memory.grant([plan], [device_id(device)])[0]
    context = torch.multiprocessing.get_context("spawn")
    link, theirs = context.Pipe()
    process = context.Process(target=holder, args=(handle, theirs), daemon=True)
    process.start()
    link.recv()
    served = Destinations([plan], memory.parts, device)
    shadow = {s.name: torch.zeros(s.shape, device=device) for s in plan.sources}
    live = {s.name: torch.rand(s.shape, device=device) for s in plan.sources}
    parameters = sum(t.numel() for t in shadow.values())
    captured, eager, checked = PublishPass(), PublishPass(capture=False), PublishPass()

    def verified() -> None:
        served.verify, served.summed = True, False
        checked(shadow, live, served, DECAY)
        served.checksums()
        served.verify = False

    def stages() -> None:
        torch._foreach_lerp_(list(shadow.values()), list(live.values()), 1 - DECAY)
        narrow = [t.to(torch.bfloat16) for t in shadow.values()]
        torch._foreach_copy_([served[name] for name in shadow], narrow)

    def handles() -> None:
        """What an RPC a parameter comes to: a new state dict, and for each tensor a handle, an answer."""
        for name in shadow:
            shadow[name].copy_(DECAY * shadow[name] + (1 - DECAY) * live[name])
            narrow = shadow[name].to(torch.bfloat16)
            link.send((name, reductions.reduce_tensor(narrow)))
            link.recv()

    def packed() -> None:
        """vLLM's packed IPC transfer of a new state dict; its loader, which would come on top, is a plain copy here."""
        state = {name: DECAY * shadow[name] + (1 - DECAY) * live[name] for name in shadow}
        for name, tensor in state.items():
            shadow[name].copy_(tensor)
        narrow = ((name, tensor.to(torch.bfloat16)) for name, tensor in state.items())
        for chunk in produce(narrow, device_id(device), lambda item: item[1], buffer_size_bytes=buffer):
            link.send(vars(chunk))
            link.recv()

    buffer = max(1 << 30, *(2 * t.numel() for t in shadow.values()))  # vLLM's default, or what the largest needs
    produce = vllm_producer()
    contenders: dict[str, Callable[[], object]] = {
        "one captured pass, in place": lambda: captured(shadow, live, served, DECAY),
        "the same, with checksums read": verified,
        "the same calls, not captured": lambda: eager(shadow, live, served, DECAY),
        "lerp, cast, copy, in place": stages,
        "state dict, a handle a parameter": handles,
    }
    if produce is not None:
        contenders["state dict, vLLM's packed IPC"] = packed
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 2):
        for name, run in contenders.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    captured(shadow, live, served, DECAY)
    torch.cuda.synchronize()
    link.send("checksum")
    if link.recv() != checksum(memory.parts[0]):
        raise RuntimeError("the other process does not see what was written")
    link.send(None)
    process.join()
    bandwidth = copy_bandwidth(device, 7)
    floor = 1e3 * BYTES_PER_PARAMETER * parameters / bandwidth
    print(f"\n{model}: {parameters / 1e6:.0f} M parameters; copy {bandwidth / 1e9:.0f} GB/s: floor {floor:.2f} ms")
    print(f"  {'':34}{'median ms':>10}{'× floor':>9}")
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for name, median in medians.items():
        print(f"  {name:34}{median:10.2f}{median / floor:9.2f}")
    ours = medians["one captured pass, in place"] / floor
    print(f"  one captured pass: {ours:.2f} x bytes / copy bandwidth (mark {MARK} x)")
    if not captured.captured:
        print("  the pass was NOT captured")
    if produce is None:
        print("  vLLM's packed IPC: left out (no vLLM with it here)")
    return {"parameters": parameters, "copy_bytes_per_second": bandwidth, "floor_ms": floor, "publish_ms": medians,
            "times_floor": ours, "mark": MARK, "captured": captured.captured, "all_ms": times}  # fmt: skip


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Both models' tables, or the ones asked for."""
    name = device_name(torch.device("cuda"))
    print(f"{name}, torch {torch.__version__}; the engine is a second process that holds the memory open")
    result: dict[str, Any] = {"device": name, "torch": torch.__version__}
    for model in options.model or ["0.5b", "7b"]:
        result[model] = measure(model, options.rounds)
        gc.collect()
        torch.cuda.empty_cache()
    if torch.cuda.device_count() < 2:
        print("\nby NCCL, ours and vLLM's: left out (needs two GPUs)")
        return result
    from bench import publish_nccl

    for model in options.model or ["0.5b", "7b"]:
        result[model]["nccl"] = publish_nccl.measure(model, plan_of(model), options.rounds)
    return result
