"""Publishing into a live vLLM engine on the CPU, against what others do (`python -m bench publish`).

Every contender gets the same job: move a float32 average one step, bring its bfloat16 copy into the same running
engine (quiesce to resume), rounds in alternation. The average's own pass, which every way needs and which is timed
alone beside them, is taken off in a second column: what is left is the delivery. The floor is the bytes of average and
copy at copy bandwidth; a CPU's copy also reads the lines that it writes, uncounted, so a pass that updates in place may
come out below 1.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from advgame_kernels import ema_update_
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from advgame.publish.channels import ShmChannel
from advgame.publish.collective import CollectiveChannel
from advgame.publish.loader import LoaderChannel
from advgame.publish.plan import Source, sources_of
from advgame.rollout import vllm_start
from advgame.rollout.channel import NoTurns, PublishTimes
from advgame.rollout.engine import Request, Sampling
from advgame.rollout.settings import VllmSettings
from advgame.rollout.vllm_engine import VllmEngine
from bench.floors import copy_bandwidth
from bench.records import device_name
from bench.timing import alternate

DECAY = 0.95
BYTES_PER_PARAMETER = 14
"""Read a float32 player, read and write the float32 average, write the bfloat16 copy."""

MARK = 10
"""Times faster than vLLM's loader that a publish shall be on `small`."""

SIZES = {
    "tiny": {"hidden_size": 256, "layers": 2, "vocab": 2048},
    "small": {"hidden_size": 768, "layers": 12, "vocab": 32_000},
}


class PerParameterChannel(NoTurns):
    """One call of vLLM's `load_weights` for every parameter, each in a message of its own."""

    direct = True
    notes = ()

    def __init__(self, sources: tuple[Source, ...]):
        self.tensors = {s.name: torch.empty(s.shape, dtype=torch.bfloat16) for s in sources}

    @property
    def destinations(self) -> Mapping[str, Tensor]:
        return self.tensors

    def prepare(self) -> dict[str, str]:
        return {}

    async def attach(self, llm: Any) -> None:
        """Nothing to connect."""

    async def deliver(self, llm: Any, *, verify: bool) -> None:
        for name, tensor in self.tensors.items():
            data = tensor.view(torch.uint8).numpy().tobytes()
            await llm.collective_rpc("advgame_load_one", args=(name, "bfloat16", list(tensor.shape), data))

    def close(self) -> None:
        self.tensors = {}


class CheckpointChannel(PerParameterChannel):
    """A checkpoint in the engine's own folder, which vLLM then reloads: its loader from end to end."""

    def __init__(self, sources: tuple[Source, ...], folder: Path):
        super().__init__(sources)
        self.file = folder / "model.safetensors"

    async def deliver(self, llm: Any, *, verify: bool) -> None:
        save_file(self.tensors, self.file, {"format": "pt"})
        await llm.collective_rpc("reload_weights")


def model_folder(folder: Path, size: Mapping[str, int]) -> torch.nn.Module:
    """A random Qwen2 of this size, saved."""
    hidden = size["hidden_size"]
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=size["vocab"],
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=size["layers"],
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return model


def average_alone(model: torch.nn.Module, rounds: int) -> float:
    """Milliseconds of the average's update without any copy."""
    live = [parameter.data for parameter in model.parameters()]
    shadow = [tensor.clone() for tensor in live]
    return alternate({"ema": lambda: ema_update_(shadow, live, DECAY)}, torch.device("cpu"), rounds)["ema"].milliseconds


async def measure(folder: Path, model: torch.nn.Module, rounds: int) -> dict[str, list[PublishTimes]]:
    """Times of every contender's publishes; two rounds of warm-up are left out."""
    live = {name: parameter.data for name, parameter in model.named_parameters()}
    shadow = {name: tensor.clone() for name, tensor in live.items()}
    sources = sources_of(live.items())
    settings = VllmSettings(max_model_len=256, cache_gib=0.25, verify_every=0)
    shm, loader, single = ShmChannel("bench", sources), LoaderChannel(sources, "bfloat16"), PerParameterChannel(sources)
    saved = CheckpointChannel(sources, folder)
    buckets = CollectiveChannel("bench", sources, torch.device("cpu"), settings)
    engine = VllmEngine(folder, name="bench", settings=settings, dtype="bfloat16", stop_ids=[0], channel=shm)

    def fused(served: Mapping[str, Tensor]) -> None:
        ema_update_(list(shadow.values()), list(live.values()), DECAY, publish=[served[name] for name in shadow])

    def rebuilt(served: Mapping[str, Tensor]) -> None:
        average = {name: DECAY * shadow[name] + (1 - DECAY) * live[name] for name in shadow}
        for name, tensor in average.items():
            shadow[name].copy_(tensor)
            served[name].copy_(tensor.to(torch.bfloat16))

    contenders: dict[str, tuple[Any, Callable[[Mapping[str, Tensor]], None]]] = {
        "in place (shared memory)": (shm, fused),
        "buckets over gloo": (buckets, fused),
        "one call of vLLM's loader": (loader, fused),
        "a call per parameter": (single, fused),
        "state dict, a call per parameter": (single, rebuilt),
        "state dict, a checkpoint, reloaded": (saved, rebuilt),
    }
    times: dict[str, list[PublishTimes]] = {name: [] for name in contenders}
    request = Request((5, 6, 7), Sampling(0.0, 1.0, 4), (0,), 0)
    version = 0
    try:
        await engine.start()
        await loader.attach(engine._process)
        await buckets.attach(engine._process)
        for turn in range(rounds + 2):
            for name, (channel, write) in contenders.items():
                engine._channel = channel
                version += 1
                await engine.publish(version, write)
                if (await engine.generate(request)).version != version:
                    raise RuntimeError(f"{name}: the engine did not serve version {version}")
                if turn >= 2:
                    times[name].append(engine.last_publish)
    finally:
        engine._channel = shm
        await engine.close()
        loader.close()
        buckets.close()
    if engine.counters["bench_restarts"]:
        raise RuntimeError("the engine was restarted in between; these times say nothing")
    return times


def report(
    times: Mapping[str, list[PublishTimes]], parameters: int, bandwidth: float, average_ms: float
) -> dict[str, Any]:
    """Prints the table; returns its numbers in milliseconds."""
    floor = 1e3 * parameters * BYTES_PER_PARAMETER / bandwidth
    print(f"{parameters / 1e6:.1f} M parameters, copy {bandwidth / 1e9:.1f} GB/s: average + copy take {floor:.2f} ms")
    print(
        f"the average's own pass alone: {average_ms:.2f} ms, in every row's `write`; `delivery` is the total without it"
    )
    parts = list(asdict(PublishTimes()))
    heads = "".join(f"{part:>9}" for part in ("delivery", *parts))
    print(f"  {'median ms':34}{'total':>10}{'× floor':>9}{heads}")
    rows = {}
    for name, taken in times.items():
        total = statistics.median(1e3 * t.total for t in taken)
        row = {part: statistics.median(1e3 * getattr(t, part) for t in taken) for part in parts}
        shown = {"delivery": total - average_ms, **row}
        print(f"  {name:34}{total:10.2f}{total / floor:9.2f}" + "".join(f"{ms:9.2f}" for ms in shown.values()))
        rows[name] = {"total": total, **shown, "all": [1e3 * t.total for t in taken]}
    first, *others = rows
    faster = {}
    for name in others:
        whole, rest = (rows[name][k] / max(rows[first][k], 1e-3) for k in ("total", "delivery"))
        faster[name] = {"total": whole, "delivery": rest}
        met = " and ".join(what for what, ratio in faster[name].items() if ratio >= MARK) or "neither"
        print(
            f"  {first} against {name}: {whole:.1f} x faster with the average, {rest:.1f} x without it "
            f"(mark {MARK} x: {met})"
        )
    return {
        "parameters": parameters, "copy_bytes_per_second": bandwidth, "floor_ms": floor, "average_ms": average_ms,
        "publish_ms": rows, "times_faster": faster, "mark": MARK,
    }  # fmt: skip


def run(options: argparse.Namespace) -> dict[str, Any]:
    """A live vLLM engine on the CPU."""
    version = vllm_start.vllm_version("bench publish")
    device = torch.device("cpu")
    bandwidth = copy_bandwidth(device, 5)
    with tempfile.TemporaryDirectory() as folder:
        model = model_folder(Path(folder), SIZES[options.size])
        parameters = sum(p.numel() for p in model.parameters())
        times = asyncio.run(measure(Path(folder), model, options.rounds))
        average_ms = average_alone(model, options.rounds)
    # a neighbour slows one measurement or the other; a floor is what the machine can do
    bandwidth = max(bandwidth, copy_bandwidth(device, 5))
    name = device_name(device)
    print(f"{name}, {torch.get_num_threads()} threads, vLLM {version}, torch {torch.__version__}")
    result = report(times, parameters, bandwidth, average_ms)
    return result | {"device": name, "threads": torch.get_num_threads(), "vllm": version, "torch": torch.__version__}
