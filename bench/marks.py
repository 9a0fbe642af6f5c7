"""The marks that the kernel library is held to, read off a result of bench.kernels: measured, wanted, met or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from advgame_kernels.head import CUDA_CHUNK_BYTES


@dataclass(frozen=True)
class Mark:
    """A measured ratio and the bound that it should keep."""

    what: str
    measured: float
    bound: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the bound is kept."""
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound


def _preference(part: dict[str, Any], cuda: bool) -> Iterator[Mark]:
    timings, case = part["timings"], part["case"]
    times = {k: v["milliseconds"] for k, v in timings.items()}
    memory = {k: v["extra_bytes"] for k, v in timings.items() if v["extra_bytes"] is not None}
    for name in (n for n in times if n.startswith("ours")):
        if cuda:
            yield Mark(f"{name}: time, three bare GEMMs = 1", times[name] / part["floor_ms"],
                       1.16 if "float32" in name else 1.08)  # fmt: skip
        for other in times:
            if other.startswith("ours") or (other.startswith("eager") and cuda):
                continue
            least = 1.2 if cuda and other.startswith("TRL") else 1.0
            yield Mark(f"{name}: times as fast as {other}", times[other] / times[name], least, True)
        if name in memory and cuda:
            room = CUDA_CHUNK_BYTES + 4 * case["vocab"] * case["width"]
            yield Mark(f"{name}: extra memory, one chunk + float32 dWeight = 1", memory[name] / room, 1.1)
        elif name in memory and memory.get("eager torch, all rows"):
            # the same batch without compaction, as a plain loop runs it
            whole = memory["eager torch, all rows"]
            yield Mark(f"{name}: extra memory, eager torch on all rows = 1", memory[name] / whole, 0.25)


def marks(result: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """Every mark that the result speaks to; printed and returned."""
    cuda = device.type == "cuda"
    found: dict[str, list[Mark]] = {}
    for name, part in result.items():
        if name.startswith("preference: "):
            found[name] = list(_preference(part, cuda))
        elif name.startswith("logprobs: "):
            found[name] = [Mark("log-prob pass: share of copy bandwidth", part["share_of_copy"],
                                0.9 if cuda else 0.7, True)]  # fmt: skip
    if "margins" in result:
        errors = result["margins"]
        found["margins"] = [
            Mark(f"{name}: margin error, eager's = 1", error / errors["eager, bfloat16 logits"], 1.0)
            for name, error in errors.items() if name.startswith("ours, float32")
        ]  # fmt: skip
    print("\nmarks")
    for name, each in found.items():
        print(f"  {name}")
        for m in each:
            sign = "≥" if m.at_least else "≤"
            print(f"    {'met    ' if m.met else 'NOT MET'}  {m.measured:8.2f} {sign} {m.bound:<5}  {m.what}")
    return [{"of": name, **asdict(m), "met": m.met} for name, each in found.items() for m in each]
