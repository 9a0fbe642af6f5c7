"""The kernel library against its floors and its peers: `python -m bench kernels --device cpu|cuda [--out]`.

Floors come first, then every contender against them. `--out` writes bench/results/<device>-<date>.json and its plot;
`--check` runs the tests first.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import advgame_kernels as ak
import torch
from advgame_kernels import native

from bench import peers
from bench.floors import HeadShape, copy_bandwidth, three_gemms
from bench.margins import margin_errors
from bench.plots import draw
from bench.timing import alternate, table

SIZES = {
    "cpu": {"head": HeadShape(1024, 8192, 256), "pairs": 4, "logits": (512, 32_768)},
    "cuda": {"head": HeadShape(8192, 128_256, 4096), "pairs": 4, "logits": (8192, 131_072)},
}


def device_name(device: torch.device) -> str:
    """The accelerator's or the processor's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found.group(1).strip() if found else platform.processor() or "cpu"


def bench_preference(
    shape: HeadShape, pairs: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> dict[str, Any]:
    """linear_preference_loss forward and backward, against three bare GEMMs and the peers."""
    floor = three_gemms(shape, dtype, device, repeats)
    rate = shape.flops / floor * 1e3
    print(f"\nlinear_preference_loss, {dtype}, {shape}, {pairs} pairs")
    print(f"  floor: three bare GEMMs, {shape.flops / 1e12:.3g} TFLOP in {floor:.2f} ms ({rate / 1e12:.3g} TFLOP/s)")
    g = torch.Generator(device="cpu").manual_seed(0)
    hidden = torch.randn(shape.rows, shape.width, generator=g).to(device, dtype).requires_grad_()
    weight = (torch.randn(shape.vocab, shape.width, generator=g) / shape.width**0.5).to(device, dtype).requires_grad_()
    labels = torch.randint(0, shape.vocab, (shape.rows,), generator=g).to(device)
    bounds = [shape.rows * i // (2 * pairs) for i in range(2 * pairs + 1)]
    ref = torch.zeros(2 * pairs, device=device)

    def ours(logits_dtype: torch.dtype | None) -> Callable[[], object]:
        def run() -> None:
            out = ak.linear_preference_loss(hidden, weight, labels, bounds, ref, logits_dtype=logits_dtype)
            torch.autograd.grad(out.loss, (hidden, weight))

        return run

    def peer(loss: peers.Loss) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(hidden, weight, labels, bounds, ref, 0.1), (hidden, weight))

    contenders = {"ours, float32 logits": ours(torch.float32)}
    if dtype != torch.float32:
        contenders[f"ours, {str(dtype).removeprefix('torch.')} logits"] = ours(dtype)
    for name, loss in peers.installed().items():
        try:
            peer(loss)()
        except (ImportError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            print(f"  {name}: left out ({type(error).__name__}: {str(error).splitlines()[0]})")
            continue
        contenders[name] = peer(loss)
    timings = alternate(contenders, device, repeats)
    print(table("  forward and backward", timings, floor))
    return {"shape": asdict(shape), "floor_ms": floor, "timings": {k: asdict(v) for k, v in timings.items()}}


def bench_logprobs(
    rows: int, vocab: int, dtype: torch.dtype, device: torch.device, repeats: int, bandwidth: float
) -> dict:
    """selective_logprobs forward and in-place backward, against reading once and reading and writing once."""
    size = rows * vocab * dtype.itemsize
    floors = {"forward": size / bandwidth * 1e3, "backward": 2 * size / bandwidth * 1e3}
    print(f"\nselective_logprobs, {dtype}, {rows} rows, vocabulary {vocab}")
    print(f"  floor: {size / 1e6:.0f} MB read, {floors['forward']:.2f} ms; back {floors['backward']:.2f} ms")
    logits = torch.randn(rows, vocab, device=device).to(dtype)
    labels = torch.randint(0, vocab, (rows,), device=device)

    def eager() -> None:
        x = torch.log_softmax(logits.float(), dim=1)
        x.gather(1, labels[:, None])
        (x.exp() * x).sum(dim=1)

    forward = {"ours": lambda: ak.selective_logprobs(logits, labels), "eager torch": eager}
    if device.type == "cpu" and native.available():
        forward["ours, torch form"] = lambda: ak.selective_logprobs(logits, labels, impl="torch")
    timings = alternate(forward, device, repeats)
    print(table("  forward", timings, floors["forward"]))
    leaf = logits.requires_grad_()

    def both(inplace: bool) -> Callable[[], object]:
        def run() -> None:
            out = ak.selective_logprobs(leaf, labels, inplace_backward=inplace)
            torch.autograd.grad(out.logps.sum(), leaf)

        return run

    def eager_both() -> None:
        x = torch.log_softmax(leaf.float(), dim=1)
        torch.autograd.grad(x.gather(1, labels[:, None]).sum(), leaf)

    whole = alternate({"ours": both(False), "ours, in place": both(True), "eager torch": eager_both}, device, repeats)
    print(table("  forward and backward", whole, floors["forward"] + floors["backward"]))
    return {
        "rows": rows, "vocab": vocab, "floors_ms": floors, "forward": {k: asdict(v) for k, v in timings.items()},
        "both": {k: asdict(v) for k, v in whole.items()},
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    """Run everything on one device and print it; write JSON when asked."""
    parser = argparse.ArgumentParser(prog="python -m bench kernels", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7, help="rounds counted for each median")
    parser.add_argument("--rows", type=int, help="rows of the head, in place of the device's default")
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--out", action="store_true", help="write bench/results/<device>-<date>.json and .svg")
    parser.add_argument("--check", action="store_true", help="run tests/kernels first, and stop if they fail")
    options = parser.parse_args(arguments)
    if options.check:
        tests = Path(__file__).parent.parent / "tests" / "kernels"
        code = subprocess.run([sys.executable, "-m", "pytest", str(tests)], check=False).returncode
        if code:
            return code
    device, sizes = torch.device(options.device), SIZES[options.device]
    shape = HeadShape(
        options.rows or sizes["head"].rows, options.vocab or sizes["head"].vocab, options.width or sizes["head"].width
    )
    narrow = device.type == "cuda"
    print(f"{device_name(device)}; torch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    bandwidth = copy_bandwidth(device, options.repeats)
    print(f"memory: {bandwidth / 1e9:.1f} GB/s, reads and writes both counted (copy or pass in place)")
    result: dict[str, Any] = {"device": device_name(device), "torch": torch.__version__, "copy_bytes_per_s": bandwidth}
    result["margins"] = margin_errors(device)
    dtypes = (torch.bfloat16,) if narrow else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        result[f"linear_preference_{name}"] = bench_preference(shape, sizes["pairs"], dtype, device, options.repeats)
        result[f"logprobs_{name}"] = bench_logprobs(*sizes["logits"], dtype, device, options.repeats, bandwidth)
    if options.out:
        folder = Path(__file__).parent / "results"
        folder.mkdir(exist_ok=True)
        slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
        path = folder / f"{slug}-{datetime.date.today().isoformat()}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        draw(result, path.with_suffix(".svg"))
        print(f"\nwritten: {path} and .svg")
    return 0
