"""The kernel library against its floors and its peers: `python -m bench kernels --device cpu|cuda [--grid] [--out]`.

Floors come first, then every contender against them. `--out` writes kernels-<device>-<date>.json and its plot into
bench/results; `--check` runs the tests first. On the CPU memory is measured in processes of their own
(bench/memory.py); losses of vectors, which take next to none, go without.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.floors import bandwidth
from bench.head import HeadCase, bench_preference
from bench.logits import bench_logprobs
from bench.margins import margin_errors
from bench.marks import marks
from bench.plots import draw
from bench.records import RESULTS, device_name, save
from bench.tokens import bench_policy, bench_tokens
from bench.vectors import bench_vectors

# The head and batch on the CPU, an 8 B model's on a GPU; --grid takes each of GRID's with every number of rows.
SIZES = {
    "cpu": {"vocab": 151_936, "width": 896, "rows": 2048, "response": 0.6, "pairs": 4},
    "cuda": {"vocab": 128_256, "width": 4096, "rows": 8192, "response": 1.0, "pairs": 4},
}
REPEATS = {"cpu": 2, "cuda": 7}  # rounds of the head, whose contenders take seconds each on a CPU
GRID = {"Qwen2.5-0.5B": (151_936, 896), "Qwen2.5-7B": (152_064, 3584), "Llama-3.1-8B": (128_256, 4096)}
GRID_ROWS, GRID_RESPONSE = (1024, 4096, 8192, 32_768), (0.3, 0.6, 1.0)


def cases(options: argparse.Namespace) -> dict[str, HeadCase]:
    """The heads to run, by name in the results."""
    sizes = SIZES[options.device]
    dtypes = (torch.bfloat16,) if options.device == "cuda" else (torch.float32, torch.bfloat16)
    if options.grid:
        shapes = [
            (f"{name}, ", *head, n, share) for name, head in GRID.items() for n in GRID_ROWS for share in GRID_RESPONSE
        ]
    else:
        chosen = {
            k: sizes[k] if getattr(options, k) is None else getattr(options, k)
            for k in ("vocab", "width", "rows", "response")
        }
        shapes = [("", *chosen.values())]
    found = {}
    for name, vocab, width, rows, share in shapes:
        for dtype in dtypes:
            case = HeadCase(vocab, width, rows, round(rows * share), options.pairs or sizes["pairs"], dtype)
            found[f"preference: {name}{case}"] = case
    return found


def fewer_rows(case: HeadCase) -> HeadCase:
    """A quarter of the rows: on a CPU the functions beside the preference loss have half a minute a round, not two."""
    return replace(case, rows=max(8, case.rows // 4), response=max(4 * case.pairs, case.response // 4))


def keep(result: dict[str, Any], folder: Path, device: torch.device) -> None:
    """<folder>/kernels-<cpu, or the GPU's name>-<date>.json and its plot."""
    slug = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-") if device.type == "cuda" else device.type
    draw(result, save(result, f"kernels-{slug}", folder).with_suffix(".svg"))


def main(arguments: list[str]) -> int:
    """Run everything on one device and print it; write JSON when asked."""
    parser = argparse.ArgumentParser(prog="python -m bench kernels", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, help="rounds counted for each median (head: 2 on a CPU; 7 elsewhere)")
    parser.add_argument("--rows", type=int, help="rows of the head's batch, in place of the device's default")
    parser.add_argument("--response", type=float, help="share of the rows that predict a response token")
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument(
        "--grid", action="store_true", help="three models' heads, 1 k to 32 k rows, 30 to 100 %% response"
    )
    parser.add_argument(
        "--out", nargs="?", const=RESULTS, type=Path, help="write kernels-<device>-<date>.json and .svg here"
    )
    parser.add_argument("--slow", action="store_true", help="also the peers that take minutes on a CPU")
    parser.add_argument("--check", action="store_true", help="run tests/kernels first, and stop if they fail")
    options = parser.parse_args(arguments)
    if options.check:
        tests = Path(__file__).parent.parent / "tests" / "kernels"
        code = subprocess.run([sys.executable, "-m", "pytest", str(tests)], check=False).returncode
        if code:
            return code
    device = torch.device(options.device)
    repeats = options.repeats or 7
    print(f"{device_name(device)}; torch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    memory = bandwidth(device, repeats)
    print(f"memory: copy {memory.copy / 1e9:.1f} GB/s, in place {memory.in_place / 1e9:.1f} GB/s, reads + writes")
    result: dict[str, Any] = {
        "device": device_name(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "bytes_per_s": asdict(memory),
    }
    result["margins"] = margin_errors(device)
    for name, case in cases(options).items():
        result[name] = bench_preference(case, device, options.repeats or REPEATS[options.device], options.slow)
    for case in list(cases(options).values())[-2:]:
        dtype = str(case.dtype).removeprefix("torch.")
        result[f"logprobs: {dtype}"] = bench_logprobs(case.response, case.vocab, case.dtype, device, repeats, memory)
    if not options.grid:
        for name, case in cases(options).items():
            less = fewer_rows(case) if device.type == "cpu" else case
            shape = name.removeprefix("preference: ").replace(str(case), str(less))
            for work, bench in (("token log-probs", bench_tokens), ("policy", bench_policy)):
                result[f"{work}: {shape}"] = bench(
                    less, device, options.repeats or REPEATS[options.device], options.slow
                )
        result |= bench_vectors(device, repeats, memory)
    result["marks"] = marks(result, device)
    if options.out:
        keep(result, options.out, device)
    return 0
