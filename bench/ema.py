"""Moving average and bf16 copy of a whole model: `python -m bench ema [--device cuda] [--model 7b] [--out]`.

Bytes and the machine's own rates come first (`copy`: one tensor into another; `best`: that or a pass in place, which on
a CPU is faster, since a copy also reads the lines that it writes), then every contender against them, in alternation.
All do the same job: a float32 average moves one step towards a float32 player, and its bfloat16 copy lies in given
memory.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import advgame_kernels as ak
import torch
from torch import Tensor, nn

from bench.floors import Bandwidth, bandwidth
from bench.records import device_name, save
from bench.shapes import MODELS, parameter_shapes
from bench.timing import alternate

DECAY = 0.95
BYTES = {"ours": 14, "foreach lerp, cast, copy": 22}
"""A parameter's: player 4 read, average 4 + 4, copy 2; the other writes and reads a converted copy and reads again."""
MARKS = {"share": 0.75, "speedup": 0.9 * 22 / 14}
"""At least this share of copy bandwidth; at least this much faster than lerp, cast and copy."""


def contenders(shadow: list[Tensor], params: list[Tensor], publish: list[Tensor]) -> dict[str, Callable[[], object]]:
    """Every way to the same result that works here, by name."""
    prepared = ak.PreparedEma(shadow, params, publish)
    averaged = _averaged_model(shadow, params)

    def foreach() -> None:
        torch._foreach_lerp_(shadow, params, 1 - DECAY)
        torch._foreach_copy_(publish, [s.to(torch.bfloat16) for s in shadow])

    def converting() -> None:
        torch._foreach_lerp_(shadow, params, 1 - DECAY)
        torch._foreach_copy_(publish, shadow)

    def single() -> None:
        for s, p, out in zip(shadow, params, publish, strict=True):
            s.mul_(DECAY).add_(p, alpha=1 - DECAY)
            out.copy_(s)

    def rebuilt() -> None:
        state = {i: DECAY * s + (1 - DECAY) * p for i, (s, p) in enumerate(zip(shadow, params, strict=True))}
        for i, out in enumerate(publish):
            shadow[i].copy_(state[i])
            out.copy_(state[i].to(torch.bfloat16))

    def swa() -> None:
        averaged.update_parameters(averaged.player)
        torch._foreach_copy_(publish, shadow)

    found: dict[str, Callable[[], object]] = {
        "ours": lambda: prepared(DECAY),
        "foreach lerp, cast, copy": foreach,
        "foreach lerp, converting copy": converting,
        "tensor by tensor, in place": single,
        "a new state dict": rebuilt,
        "torch AveragedModel, copy": swa,
    }
    if (apex := _apex(shadow, params, publish)) is not None:
        found["apex axpby, copy"] = apex
    return found


def _averaged_model(shadow: list[Tensor], params: list[Tensor]) -> Any:
    """torch's own average of a module of these parameters, its average being `shadow` (nothing is held twice)."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    player = nn.ParameterList(nn.Parameter(torch.empty(0), requires_grad=False) for _ in params)
    averaged: Any = AveragedModel(player, device=None, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    for mine, theirs, s, p in zip(player, averaged.module, shadow, params, strict=True):
        mine.data, theirs.data = p, s
    averaged.n_averaged += 1  # the first update would copy
    object.__setattr__(averaged, "player", player)
    return averaged


def _apex(shadow: list[Tensor], params: list[Tensor], publish: list[Tensor]) -> Callable[[], object] | None:
    """NVIDIA's fused a·x + b·y over lists of tensors, if apex is there with its CUDA extension."""
    try:
        apply = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
        axpby = importlib.import_module("amp_C").multi_tensor_axpby
    except (ImportError, AttributeError):
        return None
    overflow = torch.zeros(1, dtype=torch.int32, device=shadow[0].device)

    def run() -> None:
        apply(axpby, overflow, [params, shadow, shadow], 1 - DECAY, DECAY, -1)
        torch._foreach_copy_(publish, shadow)

    return run


def measure(model: str, device: torch.device, repeats: int) -> dict[str, Any]:
    """Prints the table of one model; returns its numbers."""
    shapes = parameter_shapes(model)
    shadow = [torch.zeros(shape, device=device) for shape in shapes]
    params = [torch.ones(shape, device=device) for shape in shapes]
    publish = [torch.empty(shape, device=device, dtype=torch.bfloat16) for shape in shapes]
    count = sum(s.numel() for s in shadow)
    moved = BYTES["ours"] * count
    before = bandwidth(device, repeats)
    print(f"\n{model}: {count / 1e6:.1f} M parameters in {len(shapes)} tensors, {moved / 1e9:.2f} GB to move")
    timings = alternate(contenders(shadow, params, publish), device, repeats)
    # a neighbour slows one measurement or the other; a ceiling is what the machine can do
    after = bandwidth(device, repeats)
    most = Bandwidth(max(before.copy, after.copy), max(before.in_place, after.in_place))
    floor, strict = (1e3 * moved / rate for rate in (most.copy, most.best))
    print(f"  copy {most.copy / 1e9:.1f} GB/s, in place {most.in_place / 1e9:.1f} (reads and writes): floors "
          f"{floor:.2f} and {1e3 * moved / most.in_place:.2f} ms")  # fmt: skip
    print(f"  {'':34}{'ms':>10}{'of copy':>9}{'of best':>9}{'spread':>8}")
    for name, t in timings.items():
        shares = "".join(f"{least / t.milliseconds:9.0%}" for least in (floor, strict))
        print(f"  {name:34}{t.milliseconds:10.2f}{shares}{t.spread:8.0%}")
    speedup = timings["foreach lerp, cast, copy"].milliseconds / timings["ours"].milliseconds
    share = floor / timings["ours"].milliseconds
    print(
        f"  ours: {share:.0%} of copy bandwidth (mark {MARKS['share']:.0%}); {speedup:.2f} x foreach lerp, cast, copy "
        f"(mark {MARKS['speedup']:.2f} x; {22 / 14:.2f} x by bytes)"
    )
    return {
        "parameters": count, "tensors": len(shapes), "bytes": moved, "copy_bytes_per_s": most.copy,
        "in_place_bytes_per_s": most.in_place, "floor_ms": floor, "share_of_copy": share,
        "share_of_best": strict / timings["ours"].milliseconds, "speedup_over_foreach": speedup, "marks": MARKS,
        "timings": {name: asdict(t) for name, t in timings.items()},
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    """Command line; prints a table a model, and writes JSON with `--out`."""
    parser = argparse.ArgumentParser(prog="python -m bench ema", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=sorted(MODELS), action="append", help="may be given more than once")
    parser.add_argument("--repeats", type=int, default=11, help="rounds counted for each median")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--out", action="store_true", help="write bench/results/ema-<device>-<date>.json")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    name = device_name(device)
    print(f"{name}; torch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    chosen = options.model or (["0.5b", "7b"] if device.type == "cuda" else ["100m"])
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}
    for model in chosen:
        result[model] = measure(model, device, options.repeats)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if options.out:
        save(result, f"ema-{device.type}")
    return 0
