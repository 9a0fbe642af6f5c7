"""The benchmark's own instruments: what it calls memory is memory, and everybody it times computes the same loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import head, logits, peers, tokens
from bench.floors import Bandwidth
from bench.gpu_table import gpu_table
from bench.kernels import main
from bench.marks import marks
from bench.memory import peak_in_child, with_peaks
from bench.timing import Timing

CASE = head.HeadCase(vocab=211, width=16, rows=40, response=24, pairs=2, dtype=torch.float32)


def allocate(mebibytes: int) -> Callable[[], object]:
    torch.ones(1)
    return lambda: [torch.ones(mebibytes << 18).sum() for _ in range(3)]  # one after the other: not their sum


def fail() -> Callable[[], object]:
    raise ValueError("nothing to prepare\nfrom")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_peak_of_a_fresh_process():
    peak = peak_in_child(allocate, 100)
    assert isinstance(peak, int)
    assert 100 << 20 <= peak <= 112 << 20
    assert peak_in_child(fail) == "ValueError: nothing to prepare"


def test_every_contender_that_runs_here_computes_the_same_gradients():
    problem = head.make_problem(CASE, torch.device("cpu"))
    kept = {}

    class Recorder:
        def __init__(self, problem: head.Problem) -> None:
            self.__dict__ |= vars(problem)

        def grads(self, loss: torch.Tensor) -> None:
            kept[name] = (loss.detach(), *torch.autograd.grad(loss, (problem.hidden, problem.weight)))

    for name, run in head.contenders(CASE.dtype).items():
        if name in peers.COMPILED:
            continue
        try:
            run(Recorder(problem))
        except head.ERRORS:  # not installed, or only for a GPU
            continue

    assert {"ours, float32 logits", "eager torch", "eager torch, all rows"} <= set(kept)
    want = kept["eager torch"]
    for name, found in kept.items():
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_peaks_of_token_losses_and_of_passes():
    """Whole logits are seen in eager's peak, and ours in place has next to none."""
    cpu = torch.device("cpu")
    case = head.HeadCase(vocab=20_000, width=16, rows=400, response=400, pairs=2, dtype=torch.float32)
    whole = 400 * 20_000 * 4
    plain = {name: Timing(1.0, 0.0, None) for name in ("eager torch", "ours, float32 logits")}
    for tail in (tokens.mean_nll, tokens.grpo):
        found = with_peaks(plain, cpu, tokens.prepare, case, tail)
        assert found["eager torch"].extra_bytes >= 2 * whole
        assert found["ours, float32 logits"].extra_bytes < found["eager torch"].extra_bytes
    plain = {name: Timing(1.0, 0.0, None) for name in ("eager torch", "ours, in place")}
    found = with_peaks(plain, cpu, logits.prepare, 400, 20_000, torch.float32)
    assert found["ours, in place"].extra_bytes < whole / 4 < found["eager torch"].extra_bytes


@pytest.mark.parametrize("work", ["tokens", "policy"])
def test_every_contender_for_token_losses_computes_the_same_gradients(work):
    tail = {"tokens": tokens.mean_nll, "policy": tokens.grpo}[work]
    problem = tokens.make_tokens(CASE, torch.device("cpu"))
    kept = {}
    for name, loss in tokens.contenders(tail).items():
        if "torch.compile" in name:
            continue
        try:
            kept[name] = (found := loss(problem)).detach(), *problem.grads(found)
        except head.ERRORS:  # not installed, or only for a GPU
            continue
    assert {"ours, float32 logits", "eager torch"} <= set(kept)
    for name, found in kept.items():
        for a, b in zip(found, kept["eager torch"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_marks_are_read_off_a_result():
    case = {"vocab": 128_256, "width": 4096}

    def timing(ms, extra=None):
        return {"milliseconds": ms, "spread": 0.0, "extra_bytes": extra}

    timings = {
        "ours, float32 logits": timing(11.0, 1 << 20), "eager torch": timing(10.0, 3 << 20),
        "eager torch, all rows": timing(20.0, 16 << 20), "TRL, chunked log-probs": timing(12.0),
    }  # fmt: skip
    result = {
        "preference: x": {"case": case, "floor_ms": 10.0, "timings": timings},
        "logprobs: float32": {"share_of_copy": 0.8},
    }
    on_cpu = {m["what"]: m["met"] for m in marks(result, torch.device("cpu"))}
    assert on_cpu == {
        "ours, float32 logits: times as fast as eager torch, all rows": True,
        "ours, float32 logits: times as fast as eager torch": False,
        "ours, float32 logits: times as fast as TRL, chunked log-probs": True,
        "ours, float32 logits: extra memory, eager torch on all rows = 1": True,
        "log-prob pass: share of copy bandwidth": True,
    }
    on_gpu = {m["what"]: m["met"] for m in marks(result, torch.device("cuda"))}
    assert on_gpu["ours, float32 logits: time, three bare GEMMs = 1"]
    assert not on_gpu["ours, float32 logits: times as fast as TRL, chunked log-probs"]
    assert not on_gpu["log-prob pass: share of copy bandwidth"]


def test_the_table_of_a_gpu_is_filled_from_its_marks():
    """What the table asks for is what the marks are called."""
    case = {"vocab": 128_256, "width": 4096}
    names = (
        "ours, float32 logits",
        "ours, bfloat16 logits",
        "TRL, chunked log-probs",
        "Liger, fused linear DPO",
        "QuACK",
    )
    timings = {
        n: {"milliseconds": 40.0 if n.startswith("ours") else 80.0, "spread": 0.0, "extra_bytes": 1 << 30}
        for n in names
    }
    result = {
        "device": "NVIDIA H200",
        "preference: 8192 rows": {"case": case, "floor_ms": 32.0, "timings": timings},
        "logprobs: bfloat16": {"share_of_copy": 0.93},
        "margins": {"eager, bfloat16 logits": 0.1, "ours, float32 logits (default)": 0.001},
    }
    result["marks"] = marks(result, torch.device("cuda"))
    filled, empty = gpu_table(result)[4:], gpu_table(None)[4:]
    assert len(filled) == len(empty) == 9
    assert all(row.endswith("|  |") for row in empty)
    assert not any(row.endswith("|  |") for row in filled)
    assert filled[0].endswith("| 32.00 ms |")
    assert filled[1].endswith("| 1.25 × |")
    assert filled[5].endswith("| 2.00 × |")


def test_response_rows_follow_their_prompts():
    problem = head.make_problem(CASE, torch.device("cpu"))
    assert problem.index.tolist() == [p for start in (4, 14, 24, 34) for p in range(start, start + 6)]


def test_the_grid_and_a_small_head_of_ones_own(monkeypatch):
    seen = []
    monkeypatch.setattr("bench.kernels.bench_preference", lambda case, *a: seen.append(case) or {})
    monkeypatch.setattr("bench.kernels.bandwidth", lambda *a: Bandwidth(1e9, 1e9))
    for name in ("margin_errors", "bench_logprobs", "bench_tokens", "bench_policy", "bench_vectors"):
        monkeypatch.setattr(f"bench.kernels.{name}", lambda *a: {})
    monkeypatch.setattr("bench.kernels.marks", lambda *a: [])
    assert main(["--device", "cpu", "--vocab", "64", "--rows", "20", "--response", "0.5", "--repeats", "1"]) == 0
    assert [(c.vocab, c.width, c.rows, c.response) for c in seen] == [(64, 896, 20, 10)] * 2
    seen.clear()
    assert main(["--device", "cpu", "--grid", "--repeats", "1"]) == 0
    assert len(seen) == 3 * 4 * 3 * 2
    assert {c.vocab for c in seen} == {151_936, 152_064, 128_256}
