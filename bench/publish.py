"""Publishing: average and bf16 copy of a model into its engine: `python -m bench publish [--device cuda] [--out]`.

On the CPU into a live vLLM engine (publish_vllm.py); on a GPU into a second process that holds the trainer's memory
open over CUDA IPC, as an engine does (publish_cuda.py), which needs no vLLM.
"""

from __future__ import annotations

import argparse
import time

from bench.records import save
from bench.shapes import MODELS


def main(arguments: list[str]) -> int:
    """Command line; prints a table, and writes JSON with `--out`."""
    parser = argparse.ArgumentParser(prog="python -m bench publish", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=("tiny", "small"), default="small", help="of the live engine's model (cpu)")
    parser.add_argument("--model", choices=sorted(MODELS), action="append", help="shapes (cuda); default 0.5b and 7b")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", action="store_true", help="write bench/results/publish-<device>-<date>.json")
    options = parser.parse_args(arguments)
    started = time.time()
    if options.device == "cuda":
        from bench import publish_cuda as ways
    else:
        from bench import publish_vllm as ways  # type: ignore[no-redef]
    result = ways.run(options)
    if options.out:
        result["seconds"] = time.time() - started
        save(result, f"publish-{options.device}")
    return 0
