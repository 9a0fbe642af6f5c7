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
from bench.memory import with_peaks
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


def _both(form: Pass, leaf: Tensor, labels: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(form(leaf, labels)[0].sum(), leaf)


def _in_place(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    return tuple(ak.selective_logprobs(logits, labels, inplace_backward=True))


def with_backward(device: torch.device) -> dict[str, Pass]:
    """`forms`, and ours with its gradient in the memory of the logits."""
    return forms(device) | {"ours, in place": _in_place}


def prepare(rows: int, vocab: int, dtype: torch.dtype, name: str) -> Callable[[], object]:
    """Forward and backward for a memory measurement in a process of its own."""
    form = with_backward(torch.device("cpu"))[name]

    def run(n: int, v: int) -> Callable[[], object]:
        return _both(form, torch.randn(n, v).to(dtype).requires_grad_(), torch.randint(0, v, (n,)))

    first = (rows, vocab) if "torch.compile" in name else (8, 64)
    run(*first)()
    return run(rows, vocab)


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
    whole = {name: _both(form, leaf, labels) for name, form in with_backward(device).items()}
    found = alternate(running(whole, left_out), device, repeats, warm=True)
    found = with_peaks(found, device, prepare, rows, vocab, dtype)
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
