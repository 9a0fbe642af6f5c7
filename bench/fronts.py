"""What a request costs the driver besides its own Python: `python -m bench fronts [--requests 256] [--out]`.

Real engines with a tiny model answer short requests, all at once: one is a child of this process, which runs vLLM's
front itself; the other an actor on a Ray cluster of one node, whose calls are all that this process does. Processor
time of this process a request, in alternation, our own stand-ins for the engines included; the engines' cores are
other processes and do not count. What the game adds is `bench driver`'s.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.metadata
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from advgame.cluster.ray_cluster import open_cluster
from advgame.cluster.settings import ClusterSettings
from advgame.malloc import collect_rarely
from advgame.rollout import vllm_start
from advgame.rollout.engine import Request, Sampling, stream_seed
from advgame.rollout.settings import VllmSettings
from advgame.rollout.vllm_engine import VllmEngine
from bench.play_cast import model_folder
from bench.ray_nodes import nodes
from bench.records import device_name, save

PROMPT, TOKENS = 48, 24
POSITIONS = 256
WARM = 32
"""Requests before the first round: connections and caches are made."""
LOCAL, ACTOR = "vLLM's front", "calls of a Ray actor"


def request(number: int, round_: int) -> Request:
    key = (round_, number)
    ids = tuple(3 + (7 * number + i) % 200 for i in range(PROMPT))
    return Request(ids, Sampling(temperature=1.0, max_tokens=TOKENS), key, stream_seed(0, key))


async def taken(engine: VllmEngine, requests: int, round_: int) -> float:
    """Processor milliseconds of this process a request."""
    gc.collect()
    before = time.process_time()
    await asyncio.gather(*(engine.generate(request(number, round_)) for number in range(requests)))
    return 1e3 * (time.process_time() - before) / requests


async def measure(folder: Path, address: str, requests: int, rounds: int) -> dict[str, float]:
    """Medians by way."""
    settings = VllmSettings(max_model_len=POSITIONS, cache_gib=0.25)
    cluster = open_cluster(ClusterSettings(placement="ray", address=address), {"actor": 1}, 1)
    how: dict[str, Any] = {"settings": settings, "dtype": "float32", "stop_ids": ()}
    engines = {
        LOCAL: VllmEngine(folder, name="local", **how),
        ACTOR: VllmEngine(folder, name="actor", launch=cluster.launch("actor", 0), **how),
    }
    found: dict[str, list[float]] = {name: [] for name in engines}
    try:
        for engine in engines.values():
            await engine.start()
            await taken(engine, WARM, 0)
        for round_ in range(1, rounds + 1):
            for name, engine in engines.items():
                found[name].append(await taken(engine, requests, round_))
    finally:
        for engine in engines.values():
            await engine.close()
        cluster.close()
    return {name: statistics.median(values) for name, values in found.items()}


def main(arguments: list[str]) -> int:
    """Command line; prints a table, writes JSON with `--out`."""
    parser = argparse.ArgumentParser(prog="python -m bench fronts", description=__doc__)
    parser.add_argument("--requests", type=int, default=256, help="at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", action="store_true", help="write bench/results/fronts-cpu-<date>.json")
    options = parser.parse_args(arguments)
    version = vllm_start.vllm_version("bench fronts")
    collect_rarely()  # as a run does
    with tempfile.TemporaryDirectory() as temporary, nodes((1,)) as made:
        folder = model_folder(Path(temporary) / "model", POSITIONS, "0.1m")
        found = asyncio.run(measure(folder, made.address, options.requests, options.rounds))
    name = device_name(torch.device("cpu"))
    print(f"{name}, vLLM {version}; processor milliseconds of the driver's process a request")
    for what, milliseconds in found.items():
        print(f"  {what:24}{milliseconds:8.3f}")
    if options.out:
        head = {"device": name, "vllm": version, "ray": importlib.metadata.version("ray"), "torch": torch.__version__}
        save(head | {"requests": options.requests, "rounds": options.rounds, "result": found}, "fronts-cpu")
    return 0
