"""Play without barriers against play stage by stage, on real vLLM engines: `python -m bench play [--out]`.

The rival plays as published: all attacks of the batch, then all faithfulness verdicts, then all responses, then all
verdicts of the Defender's judge, then those of the Attacker's; each stage waits for its slowest request. Attacker,
Defender and judge are an engine each, or one together (`--engines 1`). Random weights end nowhere, so every request is
given its length: log-normal, drawn from its key, the same for both contenders; the Attacker's prompts are normal.
Lengths are a quarter of real ones (prompts 300 ± 80 tokens, completions median 300, sigma 0.6, cut at 2048), and so are
the words of the templates. The judge's verdict is a hash of the tokens that its engine made.

A third contender carries late trees over (`run.carry_over`): a batch begins when three quarters of the one before, and
all of those before that, have ended; the batches of all rounds follow one another, and all trees are waited for.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from advgame.game.play import PlayRules, Table, play_batch
from advgame.game.prompts import Templates
from advgame.game.tree import Tree
from advgame.rollout import vllm_start
from advgame.rollout.engine import Sampling
from advgame.rollout.settings import VllmSettings
from advgame.rollout.speaker import Speaker
from advgame.rollout.vllm_engine import VllmEngine
from bench.play_cast import (
    DEVIATION,
    MODELS,
    PROMPT,
    SEED,
    Given,
    HashJudge,
    Lengths,
    Words,
    model_folder,
    seeds_of,
    without_logprobs,
)
from bench.records import device_name, save
from bench.stages import play_stages

ROLES = ("attacker", "defender", "judge")
LATE = 0.25
BARRED, FREE, CARRIED = "stage by stage", "no barriers", "… late ones carried over"


async def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both contenders in alternation, on the same running engines with empty caches."""
    settings = VllmSettings(
        max_model_len=options.positions, cache_gib=options.cache_gib, max_sequences=options.max_sequences
    )
    players, judge = Lengths(options.median, 0.6, options.cut), Lengths(options.judge_median, 0.6, options.cut)
    engines = {
        role: VllmEngine(folder, name=role, settings=settings, dtype="float32", stop_ids=[], version=0)
        for role in ROLES[: options.engines]
    }
    first, *_ = engines.values()
    sampling = Sampling(options.temperature, 1.0, options.cut)
    frames = {"attacker": "<think> why </think> <prompt> {} </prompt>"}
    speakers = {}
    for role in ROLES:
        given = Given(engines.get(role, first), judge if role == "judge" else players)
        # only `generate` is asked of it
        speakers[role] = Speaker(role, given, Words(frames.get(role, "{}")), sampling, SEED, retries=0)  # type: ignore[arg-type]
    templates = Templates.load()
    table = Table(
        speakers["attacker"], speakers["defender"], HashJudge(speakers["judge"], templates), templates,
        PlayRules(attacks=options.attacks, responses=options.responses),
    )  # fmt: skip
    seeds = seeds_of(options.seeds, templates)

    async def free(step: int) -> list[Tree]:
        return await play_batch(table, seeds, step, in_flight=len(seeds))

    async def barred(step: int) -> list[Tree]:
        return await play_stages(table, seeds, step)

    async def carried(steps: Sequence[int]) -> list[list[Tree]]:
        rounds: list[asyncio.Task[list[Tree]]] = []
        for step in steps:
            enough, ended = asyncio.Event(), []

            def took(tree: Tree, ended: list[Tree] = ended, enough: asyncio.Event = enough) -> None:
                ended.append(tree)
                if len(ended) >= len(seeds) - int(LATE * len(seeds)):
                    enough.set()

            before = rounds[-1:]
            playing = play_batch(table, seeds, step, in_flight=len(seeds), on_tree=took)
            rounds.append(asyncio.create_task(playing))
            await enough.wait()
            await asyncio.gather(*before)
        return list(await asyncio.gather(*rounds))

    runs: dict[str, list[dict[str, Any]]] = {BARRED: [], FREE: [], CARRIED: []}

    async def timed(name: str, playing: Callable[[], Awaitable[Any]], batches: int = 1) -> Any:
        for engine in engines.values():
            await engine._process.reset_caches()
        for speaker in speakers.values():
            speaker.meter.take()
        started = time.perf_counter()
        made = await playing()
        seconds = (time.perf_counter() - started) / batches
        used = {role: speaker.meter.take() for role, speaker in speakers.items()}
        engine_seconds = {role: busy / batches for role, (busy, _) in used.items()}
        requests = {role: summed / batches for role, (_, summed) in used.items()}
        print(f"  {name}: {seconds:.1f} s a batch", file=sys.stderr, flush=True)
        runs[name].append({"seconds": seconds, "engine": engine_seconds, "requests": requests})
        return made

    steps = range(1, options.rounds + 1)
    played: dict[str, dict[int, list[Tree]]] = {BARRED: {}, FREE: {}}
    try:
        for engine in engines.values():
            await engine.start()
        await barred(0)
        await free(0)
        for step in steps:
            order = [(BARRED, barred), (FREE, free)]
            # who goes first changes with the rounds
            for name, playing in order if step % 2 else order[::-1]:
                played[name][step] = await timed(name, lambda playing=playing, step=step: playing(step))  # type: ignore[misc]
        carried_trees = await timed(CARRIED, lambda: carried(steps), options.rounds)
    finally:
        for engine in engines.values():
            await engine.close()
    differ = 0
    for step, third in zip(steps, carried_trees, strict=True):
        for trees in zip(played[BARRED][step], played[FREE][step], third, strict=True):
            differ += len({repr(without_logprobs(tree)) for tree in trees}) > 1
    counters = {role: dict(speaker.counters) for role, speaker in speakers.items()}
    return {"runs": runs, "differ": differ, "counters": counters, "trees": len(seeds)}


def report(result: dict[str, Any]) -> None:
    """Prints the table and the verdict; adds medians to `result`."""
    trees, runs = result["trees"], result["runs"]
    print(
        f"  {'median':26}{'s':>8}{'trees/s':>9}{'trees/h':>9}   engine-seconds " + "  ".join(ROLES) + "   judge's share"
    )
    medians = {}
    for name, taken in runs.items():
        seconds = statistics.median(r["seconds"] for r in taken)
        engine = {role: statistics.median(r["engine"][role] for r in taken) for role in ROLES}
        share = engine["judge"] / sum(engine.values())
        medians[name] = {"seconds": seconds, "trees_per_hour": 3600 * trees / seconds, "engine_seconds": engine}
        cells = "  ".join(f"{engine[role]:.2f}" for role in ROLES)
        rounds = ", ".join(f"{r['seconds']:.1f}" for r in taken)
        print(
            f"  {name:26}{seconds:8.2f}{trees / seconds:9.2f}{3600 * trees / seconds:9.0f}   {cells}   {share:.0%}"
            f"   all rounds: {rounds}"
        )
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(runs[BARRED], runs[FREE], strict=True)]
    late = medians[BARRED]["seconds"] / medians[CARRIED]["seconds"]
    print(
        f"  {FREE}: {statistics.median(ratios):.2f} x the trees a second "
        f"(rounds: {', '.join(f'{ratio:.2f}' for ratio in ratios)})"
    )
    print(f"  {CARRIED}: {late:.2f} x")
    result |= {"median": medians, "ratios": ratios, "ratio": statistics.median(ratios), "ratio_carried": late}


def main(arguments: list[str]) -> int:
    """Command line; prints a table, and writes JSON with `--out`. Exit code 1: the contenders played other trees."""
    parser = argparse.ArgumentParser(prog="python -m bench play", description=__doc__)
    parser.add_argument("--engines", type=int, choices=(1, 3), default=3, help="of one thread each")
    parser.add_argument("--model", choices=tuple(MODELS), default="25m", help="parameters of the random model")
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--attacks", type=int, default=2)
    parser.add_argument("--responses", type=int, default=2)
    parser.add_argument("--median", type=float, default=75.0, help="tokens of an attack or response")
    parser.add_argument("--judge-median", type=float, default=100.0, help="tokens of a verdict")
    parser.add_argument("--cut", type=int, default=512, help="longest completion")
    parser.add_argument("--positions", type=int, default=4096, help="longest prompt + completion")
    parser.add_argument(
        "--max-sequences", type=int, default=256, help="most completions that an engine decodes at once"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="0: greedy, which spares vLLM a generator a row")
    parser.add_argument("--cache-gib", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", action="store_true", help="write bench/results/play-<engines>-cpu-<date>.json")
    options = parser.parse_args(arguments)
    version = vllm_start.vllm_version("bench play")
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(measure(model_folder(Path(folder), options.positions, options.model), options))
    name = device_name(torch.device("cpu"))
    print(f"{name}, vLLM {version}, torch {torch.__version__}; engines of one thread: {options.engines}")
    print(
        f"a random Qwen2 of {options.model} parameters; "
        f"{options.seeds} seeds, A = {options.attacks}, D = {options.responses}; prompts normal, mean {PROMPT:g}, "
        f"deviation {DEVIATION:g}; completions log-normal, sigma 0.6, median {options.median:g} "
        f"(judge {options.judge_median:g}), cut {options.cut}, seed {SEED}; "
        f"at most {options.max_sequences} sequences an engine"
    )
    report(result)
    total = options.seeds * options.rounds
    print(f"  equal trees in all three (tokens, verdicts, representatives): {total - result['differ']} of {total}")
    if options.out:
        result |= {"options": vars(options), "device": name, "vllm": version, "torch": torch.__version__}
        save(result, f"play-{options.engines}-engines-cpu")
    return 1 if result["differ"] else 0
