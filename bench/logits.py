"""selective_logprobs on logits that exist: forward and backward against one read, and one read and write."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import advgame_kernels as ak
import torch
from advgame_kernels import native
from torch import Tensor

from bench.floors import Bandwidth
from bench.head import ERRORS
from bench.records import reason
from bench.timing import alternate, table

Pass = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def eager(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy as plain code writes them."""
    x = torch.log_softmax(logits.float(), dim=1)
    return x.gather(1, labels[:, None])[:, 0], -(x.exp() * x).sum(dim=1)


def trl(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """TRL's own function for both, its Triton kernel where that serves."""
    return importlib.import_module("trl.trainer.utils").selective_log_softmax_and_entropy(logits, labels)


def forms(device: torch.device) -> dict[str, Pass]:
    """Everybody's forward pass, ours first."""
    found: dict[str, Pass] = {"ours": lambda x, y: tuple(ak.selective_logprobs(x, y))}
    found |= {"eager torch": eager, "eager torch, torch.compile": torch.compile(eager), "TRL": trl}
    if device.type == "cpu" and native.available():
        found["ours, torch form"] = lambda x, y: tuple(ak.selective_logprobs(x, y, impl="torch"))
    return found


def running(runs: Mapping[str, Callable[[], object]], left_out: dict[str, str]) -> dict[str, Callable[[], object]]:
    """Those that get through a first run, which is not counted; the others are named with their reason."""
    found = {}
    for name, run in runs.items():
        try:
            run()
        except ERRORS as error:
            left_out[name] = reason(error)
            print(f"  {name}: left out ({left_out[name]})")
        else:
            found[name] = run
    return found


def bench_logprobs(
    rows: int, vocab: int, dtype: torch.dtype, device: torch.device, repeats: int, memory: Bandwidth
) -> dict[str, Any]:
    """Forward, and forward with backward from the log-probs; printed and returned."""
    size = rows * vocab * dtype.itemsize
    floors = {"forward": size / memory.best * 1e3, "backward": 2 * size / memory.best * 1e3}
    print(f"\nselective_logprobs, {dtype}, {rows} rows, vocabulary {vocab}")
    print(f"  floor: {size / 1e6:.0f} MB read, {floors['forward']:.2f} ms; back {floors['backward']:.2f} ms")
    logits = torch.randn(rows, vocab, device=device).to(dtype)
    labels = torch.randint(0, vocab, (rows,), device=device)
    left_out: dict[str, str] = {}
    runs = {name: lambda form=form: form(logits, labels) for name, form in forms(device).items()}
    timings = alternate(running(runs, left_out), device, repeats, warm=True)
    print(table("  forward", timings, floors["forward"]))
    share = size / (timings["ours"].milliseconds / 1e3) / memory.copy
    print(f"  ours reads at {share:.0%} of copy bandwidth")
    leaf = logits.detach().requires_grad_()

    def both(form: Pass) -> Callable[[], object]:
        return lambda: torch.autograd.grad(form(leaf, labels)[0].sum(), leaf)

    whole: dict[str, Callable[[], object]] = {
        "ours, in place": both(lambda x, y: tuple(ak.selective_logprobs(x, y, inplace_backward=True)))
    }
    whole = {name: both(form) for name, form in forms(device).items()} | whole
    found = alternate(running(whole, left_out), device, repeats, warm=True)
    print(table("  forward and backward", found, floors["forward"] + floors["backward"]))
    return {
        "rows": rows,
        "vocab": vocab,
        "floors_ms": floors,
        "share_of_copy": share,
        "forward": {k: asdict(v) for k, v in timings.items()},
        "both": {k: asdict(v) for k, v in found.items()},
        "left_out": left_out,
    }
