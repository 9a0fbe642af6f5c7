"""Everybody's preference loss on one LM head: the contenders, and their run against three bare GEMMs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import advgame_kernels as ak
import torch
from torch import Tensor

from bench import peers
from bench.floors import HeadShape, three_gemms
from bench.memory import peak_in_child
from bench.records import reason as reason_of
from bench.timing import Timing, alternate, table

BETA = 0.1
ERRORS = (ImportError, RuntimeError, TypeError, ValueError, AttributeError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class HeadCase:
    """A batch of pairs on a head: `rows` positions, of which `response` predict a scored token."""

    vocab: int
    width: int
    rows: int
    response: int
    pairs: int
    dtype: torch.dtype

    @property
    def shape(self) -> HeadShape:
        """What the matrix products are about: response rows only."""
        return HeadShape(self.response, self.vocab, self.width)

    @property
    def bounds(self) -> list[int]:
        """Where the sequences' response rows begin and end."""
        return [self.response * i // (2 * self.pairs) for i in range(2 * self.pairs + 1)]

    def __str__(self) -> str:
        share = self.response / self.rows
        return (
            f"{self.rows} rows, {self.response} of them response ({share:.0%}), {self.pairs} pairs, vocabulary "
            f"{self.vocab}, width {self.width}, {str(self.dtype).removeprefix('torch.')}"
        )


@dataclass(frozen=True)
class Problem:
    """The tensors of a case."""

    case: HeadCase
    hidden: Tensor  # (rows, H), a leaf
    weight: Tensor  # (V, H), a leaf
    index: Tensor  # (response,) positions of the response rows: each sequence begins with its prompt
    labels: Tensor  # (response,)
    ref: Tensor  # (2P,)

    def grads(self, loss: Tensor) -> None:
        """Backward, to hidden states and head."""
        torch.autograd.grad(loss, (self.hidden, self.weight))


def make_problem(case: HeadCase, device: torch.device) -> Problem:
    """Random inputs of a case."""
    torch.manual_seed(0)
    sequences, bounds = 2 * case.pairs, case.bounds
    ends = [case.rows * (i + 1) // sequences for i in range(sequences)]
    index = torch.cat([torch.arange(ends[i] - (bounds[i + 1] - bounds[i]), ends[i]) for i in range(sequences)])
    hidden = torch.randn(case.rows, case.width, device=device).to(case.dtype)
    weight = torch.empty(case.vocab, case.width, device=device, dtype=case.dtype).normal_(std=case.width**-0.5)
    labels = torch.randint(0, case.vocab, (case.response,), device=device)
    ref = torch.zeros(sequences, device=device)
    return Problem(case, hidden.requires_grad_(), weight.requires_grad_(), index.to(device), labels, ref)


Contender = Callable[[Problem], None]


def _ours(narrow: bool) -> Contender:
    def run(p: Problem) -> None:
        rows = p.hidden.index_select(0, p.index)
        dtype = p.case.dtype if narrow else torch.float32
        p.grads(
            ak.linear_preference_loss(
                rows, p.weight, p.labels, p.case.bounds, p.ref, beta=BETA, logits_dtype=dtype
            ).loss
        )

    return run


def _peer(loss: peers.Loss) -> Contender:
    def run(p: Problem) -> None:
        p.grads(loss(p.hidden.index_select(0, p.index), p.weight, p.labels, p.case.bounds, p.ref, BETA))

    return run


def _all_rows(p: Problem) -> None:
    """What a plain loop does: logits of every position, of which the response's are picked afterwards."""
    labels = p.labels.new_zeros(p.case.rows).index_copy(0, p.index, p.labels)
    log_probs = torch.log_softmax((p.hidden @ p.weight.t()).float(), dim=1)
    tokens = log_probs.gather(1, labels[:, None])[:, 0]
    p.grads(peers.dpo(tokens.index_select(0, p.index), p.case.bounds, p.ref, BETA))


def contenders(dtype: torch.dtype) -> dict[str, Contender]:
    """Everybody who can be asked, ours first; whether they can run is seen when they do."""
    found: dict[str, Contender] = {"ours, float32 logits": _ours(False)}
    if dtype != torch.float32:
        found[f"ours, {str(dtype).removeprefix('torch.')} logits"] = _ours(True)
    found["eager torch"] = _peer(peers.eager)
    found["eager torch, all rows"] = _all_rows
    found |= {name: _peer(loss) for name, loss in peers.PEERS.items()}
    return found


def prepare(case: HeadCase, name: str) -> Callable[[], object]:
    """For a memory measurement in a process of its own."""
    run = contenders(case.dtype)[name]
    device = torch.device("cpu")
    run(make_problem(case if name in peers.COMPILED else small(case), device))
    problem = make_problem(case, device)
    return lambda: run(problem)


def small(case: HeadCase) -> HeadCase:
    """The same kind of batch, too small to count."""
    return replace(case, vocab=512, width=64, rows=8 * case.pairs, response=4 * case.pairs)


def bench_preference(case: HeadCase, device: torch.device, repeats: int, slow: bool = False) -> dict[str, Any]:
    """linear_preference_loss forward and backward, against three bare GEMMs and the peers; printed and returned.

    slow: also ask those who take minutes on a CPU.
    """
    print(f"\nlinear_preference_loss: {case}")
    floor = three_gemms(case.shape, case.dtype, device, repeats)
    rate = case.shape.flops / floor * 1e3
    print(
        f"  floor: three bare GEMMs, {case.shape.flops / 1e12:.3g} TFLOP in {floor:.2f} ms ({rate / 1e12:.3g} TFLOP/s)"
    )
    problem, little = make_problem(case, device), make_problem(small(case), device)
    runs: dict[str, Callable[[], object]] = {}
    memory: dict[str, int | None] = {}
    left_out: dict[str, str] = {}
    for name, run in contenders(case.dtype).items():
        reason = None if slow or device.type != "cpu" else peers.SLOW_ON_CPU.get(name)
        if device.type == "cpu" and reason is None:
            peak = peak_in_child(prepare, case, name)
            memory[name], reason = (None, peak) if isinstance(peak, str) else (peak, None)
        try:
            if reason is None:
                # The full run that is not counted; on the CPU it takes seconds and shows what a small one does
                # not in generated code alone.
                run(problem if device.type != "cpu" or name in peers.COMPILED else little)
        except ERRORS as error:
            reason = reason_of(error)
        if reason is None:
            runs[name] = lambda run=run: run(problem)
        else:
            left_out[name] = reason
            print(f"  {name}: left out ({reason})")
    timings = alternate(runs, device, repeats, warm=True)
    timings = {n: replace(t, extra_bytes=memory.get(n, t.extra_bytes)) for n, t in timings.items()}
    print(table("  forward and backward", timings, floor))
    return measured(case, floor, timings, left_out)


def measured(case: HeadCase, floor: float, timings: Mapping[str, Timing], left_out: dict[str, str]) -> dict[str, Any]:
    """What a result keeps of one work on a head. floor: ms."""
    return {
        "case": asdict(case) | {"dtype": str(case.dtype).removeprefix("torch.")},
        "floor_ms": floor,
        "timings": {k: asdict(v) for k, v in timings.items()},
        "left_out": left_out,
    }
