"""A training step of one player, ours against the published way, and what each change between them saves:
`python -m bench step [--device cuda] [--size 0.5b|7b] [--out [FILE]]`.

Both start from the same weights, moving average, optimiser and sampled completions, and must find the same gradients.
Contenders run in alternating rounds, on a CPU in processes of their own. `peak` is what forward and backward take at
the most, above weights, moments and averages. On a GPU each takes as many pairs at once as fit. Lengths and shapes:
bench/step_case.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from advgame.game.pairs import Pair
from advgame.learn.packing import pack
from advgame.malloc import keep_freed_memory
from bench.floors import HeadShape, three_gemms
from bench.peak import Peak
from bench.records import RESULTS, device_name, save, today, write
from bench.step_case import SEED, SHAPES, Case, layers_that_fit, model_of, pairs_of, useful_flops
from bench.step_ways import PUBLISHED_PARTS, WAYS, Contender, learner_of

COMPARED = 1 << 22
"""Elements of a gradient that a GPU's contenders compare, evenly spread; on a CPU all of them."""
SAMPLER = "sampler"
GAPS = {"float32": 1e-4, "bfloat16": 5e-2}
"""What gradients may differ by: any parameter's, in float32; the whole gradient's, where bfloat16 rounds."""


def sampled(case: Case, folder: Path) -> None:
    """Writes the sampler's log-probs of all completions, from the moving average."""
    learner = learner_of(model_of(case), case.dtype)
    device = learner.model.device
    samples = [s for pair in pairs_of(case) for s in (pair.chosen, pair.rejected)]
    logps = [part.tolist() for part in learner._reference_logps([pack([s], device) for s in samples], learner.shadow)]
    (folder / "logps.json").write_text(json.dumps(logps))


def played(case: Case, folder: Path) -> list[Pair]:
    """The pairs with the sampler's log-probs."""
    logps = iter(json.loads((folder / "logps.json").read_text()))
    return [
        replace(p, chosen=replace(p.chosen, logprobs=next(logps)), rejected=replace(p.rejected, logprobs=next(logps)))
        for p in pairs_of(case)
    ]


def contend(name: str, tasks: Sequence[str], case: Case, folder: Path, at_once: int | None) -> dict[str, Any]:
    """What is done with one contender: `check` (memory, gradients), `time`, or both."""
    if name == SAMPLER:
        sampled(case, folder)
        return {}
    pairs = played(case, folder)
    try:
        contender = Contender(name, model_of(case), case.dtype)
        contender.at_once = at_once or contender.at_once
        contender.warm_optimizer()
    except torch.OutOfMemoryError:
        return {"too_large": True}
    keep_freed_memory()  # as a run does: else every large tensor faults its pages in anew
    result: dict[str, Any] = {}
    if "check" in tasks:
        found = checked(contender, pairs, folder)
        if found is None:
            return {"too_large": True}
        result |= found
    return result | timed(contender, pairs, case) if "time" in tasks else result


def checked(contender: Contender, pairs: Sequence[Pair], folder: Path) -> dict[str, Any] | None:
    """The peak of forward and backward (AdamW works in place), and the gradients compared.

    A batch that does not fit is halved until it does; None: not even a pair fits.
    """
    contender.at_once = contender.at_once or len(pairs)
    while True:
        try:
            with Peak(contender.model.device) as peak:
                gradients = contender.gradients(pairs)
            break
        except torch.OutOfMemoryError:
            pass  # here the failed step's tensors are gone
        contender.forget()
        if contender.at_once == 1:
            return None
        contender.at_once = (contender.at_once + 1) // 2
    result = {"peak": peak.bytes, "whole": peak.whole, "at_once": contender.at_once}
    result |= compare(gradients, folder / "gradients.safetensors")
    contender.forget()
    return result


def timed(contender: Contender, pairs: Sequence[Pair], case: Case) -> dict[str, Any]:
    """Seconds of whole steps, after one on two pairs (on a GPU on all: kernels are chosen and compiled by shape)."""
    contender.step(pairs if case.gpu else pairs[:2])
    seconds = []
    for _ in range(case.steps):
        if case.gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        contender.step(pairs)
        if case.gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds}


def compare(gradients: Mapping[str, Tensor], file: Path) -> dict[str, float]:
    """Relative distance from the first contender's gradients, which it keeps: the largest of any parameter (`gap`) and
    that of all together (`whole_gap`)."""

    def part(gradient: Tensor) -> Tensor:
        flat = gradient.detach().flatten()
        return flat[:: -(-len(flat) // COMPARED)] if flat.is_cuda else flat

    parts = {name: part(gradient) for name, gradient in gradients.items()}
    if not file.exists():
        save_file({name: taken.cpu().contiguous() for name, taken in parts.items()}, file)
        return {"gap": 0.0, "whole_gap": 0.0}
    with safe_open(file, framework="pt") as kept:
        assert set(kept.keys()) == set(gradients)
        sizes, gaps = [], []
        for name, taken in parts.items():
            theirs = kept.get_tensor(name).to(taken.device)
            sizes.append(float(theirs.norm()))
            gaps.append(float((taken - theirs).norm()))
    whole = sum(gap**2 for gap in gaps) ** 0.5 / sum(size**2 for size in sizes) ** 0.5
    return {"gap": max(gap / size for gap, size in zip(gaps, sizes, strict=True)), "whole_gap": whole}


def main(arguments: list[str]) -> int:
    """Command line; prints the table, writes JSON with `--out`. Exit code 1: somebody found other gradients."""
    parser = argparse.ArgumentParser(prog="python -m bench step", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=SHAPES, default="0.5b", help="width, heads and vocabulary")
    parser.add_argument("--layers", type=int, help="depth (default: 2 on a CPU, as many as fit on a GPU)")
    parser.add_argument("--pairs", type=int, help="default: 4 on a CPU, 16 on a GPU")
    parser.add_argument("--dtype", choices=GAPS, help="compute (default: bfloat16 on a GPU)")
    parser.add_argument("--rounds", type=int, default=3, help="processes of the published way and of ours, each")
    parser.add_argument("--steps", type=int, help="measured steps of a process (default: 1, on a GPU 3)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="default: all; on a GPU those of the waterfall")
    parser.add_argument(
        "--inside", action="store_true", help="all in this process, as on a GPU, whose allocator counts by itself"
    )
    parser.add_argument("--launch", default="", help="a command before each timed process, such as 'numactl -N 0'")
    parser.add_argument(
        "--out", type=Path, nargs="?", const=RESULTS, help="JSON, here or as bench/results/step-<size>-<device>-<date>"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--task", nargs="+", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--at-once", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.child:
        case = Case(**json.loads((chosen.folder / "case.json").read_text()))
        print(json.dumps(contend(chosen.child, chosen.task, case, chosen.folder, chosen.at_once)))
        return 0

    device = torch.device(chosen.device)
    gpu = device.type == "cuda"
    fitting = layers_that_fit(chosen.size, torch.cuda.mem_get_info(device)[1]) if gpu else 2
    case = Case(
        chosen.device, chosen.size, chosen.layers or fitting, chosen.pairs or (16 if gpu else 4),
        chosen.dtype or ("bfloat16" if gpu else "float32"), chosen.steps or (3 if gpu else 1),
    )  # fmt: skip
    ways = chosen.ways or [name for name in WAYS if not gpu or name != PUBLISHED_PARTS]
    with tempfile.TemporaryDirectory() as made:
        launch = None if gpu or chosen.inside else shlex.split(chosen.launch)
        result = measure(case, Path(made), ways, chosen.rounds, launch)
    print(report(result))
    if chosen.out is not None:
        if chosen.out.is_dir():
            machine = device_name(device).split() if gpu else ["cpu"]
            save(result, "-".join(["step", chosen.size, *machine]), chosen.out)
        else:
            write(result, chosen.out)
    return 0 if result["equal_gradients"] else 1


def measure(case: Case, folder: Path, ways: Sequence[str], rounds: int, launch: Sequence[str] | None) -> dict[str, Any]:
    """Runs everybody; returns what goes into the file. launch: what timed processes start with; None: no processes."""
    (folder / "case.json").write_text(json.dumps(asdict(case)))

    def run(name: str, *tasks: str, at_once: int | None = None) -> dict[str, Any]:
        if launch is None:
            result = contend(name, tasks, case, folder, at_once)
            gc.collect()
            if case.gpu:
                torch.cuda.empty_cache()
        else:
            command = [
                sys.executable,
                "-m",
                "bench",
                "step",
                "--child",
                name,
                "--folder",
                str(folder),
                "--task",
                *tasks,
            ]
            command += [] if at_once is None else ["--at-once", str(at_once)]
            command = [*launch, *command] if "time" in tasks else command
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}, {' '.join(tasks)}: {result}", file=sys.stderr, flush=True)
        return result

    run(SAMPLER, "check")
    # a process's peak of memory is that of all it did: there the timed ones come after, each on its own
    found = {name: run(name, *(("check", "time") if launch is None else ("check",))) for name in ways}
    fitting = [name for name in ways if "too_large" not in found[name]]
    seconds: dict[str, list[float]] = {name: list(found[name].get("seconds", ())) for name in fitting}
    for number in range(1 if launch is None else 0, rounds):
        for name in fitting:
            if number == 0 or name in ("published", "ours"):
                seconds[name] += run(name, "time", at_once=found[name]["at_once"])["seconds"]

    device, config = torch.device(case.device), case.config
    shape = HeadShape(4096 if case.gpu else 256, config.vocab_size, config.hidden_size)
    rate = shape.flops / (three_gemms(shape, getattr(torch, case.dtype), device, 3) / 1e3)
    pairs = pairs_of(case)
    samples = [s for pair in pairs for s in (pair.chosen, pair.rejected)]
    tokens = sum(len(s.prompt_ids) + len(s.token_ids) for s in samples)
    flops = useful_flops(case, pairs)
    table: dict[str, dict[str, float]] = {}
    for name in fitting:
        middle = statistics.median(seconds[name])
        own = found[name]
        table[name] = {
            "seconds": middle, "least": min(seconds[name]), "most": max(seconds[name]), "at_once": own["at_once"],
            "tokens_per_second": tokens / middle, "utilisation": flops / middle / rate,
            "peak_bytes": own["peak"], "whole_peak_bytes": own["whole"],
            "gradient_gap": own["gap"], "whole_gradient_gap": own["whole_gap"],
        }  # fmt: skip
    result = {
        "date": today(), "device": device_name(device),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "case": asdict(case), "seed": SEED,
        "lengths": case.lengths, "prompt_tokens": sum(len(p.chosen.prompt_ids) for p in pairs),
        "response_tokens": sum(len(s.token_ids) for s in samples),
        "gemm_flops_per_second": rate, "useful_flops": flops, "ways": table,
        "too_large": [name for name in ways if name not in fitting],
    }  # fmt: skip
    kind = "gradient_gap" if case.dtype == "float32" else "whole_gradient_gap"
    result["equal_gradients"] = max((row[kind] for row in table.values()), default=0.0) <= GAPS[case.dtype]
    if {"published", "ours"} <= set(table):
        published, ours = table["published"], table["ours"]
        result["times_as_fast"] = published["seconds"] / ours["seconds"]
        result["share_of_peak"] = ours["peak_bytes"] / published["peak_bytes"]
        if case.gpu or launch is not None:  # one process's own memory also holds what earlier contenders left
            result["share_of_whole_peak"] = ours["whole_peak_bytes"] / published["whole_peak_bytes"]
    return result


def report(result: Mapping[str, Any]) -> str:
    """The result as a waterfall: each line has one change more than the line above it."""
    case, ways = result["case"], result["ways"]
    lines = [
        f"{result['device']}, {result['threads']} threads, torch {result['torch']}",
        f"{case['size']}-shaped, {case['layers']} layers, {case['dtype']}; {case['pairs']} pairs, "
        f"{result['prompt_tokens']} prompt and {result['response_tokens']} response tokens; {result['lengths']}, "
        f"seed {result['seed']}",
        f"GEMM rate {result['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s, a step needs "
        f"{result['useful_flops'] / 1e12:.3g} TFLOP",
        f"  {'':30}{'at once':>8}{'s':>9}{'saved':>9}{'tokens/s':>10}{'MFU':>6}{'peak MiB':>10}{'gradient gap':>14}",
    ]
    before = None
    for name, row in ways.items():
        alone = before is None or name.startswith("published")
        saved = "" if alone or before is None else f"{before - row['seconds']:.3f}"
        before = row["seconds"]
        lines.append(
            f"  {name:30}{row['at_once']:8}{row['seconds']:9.3f}{saved:>9}{row['tokens_per_second']:10.1f}"
            f"{row['utilisation']:6.0%}{row['peak_bytes'] / 2**20:10.0f}{row['gradient_gap']:14.1e}"
        )
    lines += [f"  {name}: does not fit into memory" for name in result["too_large"]]
    if "times_as_fast" in result:
        lines.append(
            f"ours: {result['times_as_fast']:.2f} times as fast as published, {result['share_of_peak']:.3f} of its "
            "peak memory"
        )
    if "share_of_whole_peak" in result:
        lines.append(f"  ({result['share_of_whole_peak']:.3f} with weights, moments and averages)")
    if not result["equal_gradients"]:
        lines.append(f"GRADIENTS DIFFER by more than {GAPS[case['dtype']]:.0e} of their size")
    return "\n".join(lines)
