"""Everything a plan takes for granted: one number a line, with its unit and where it comes from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from advgame.errors import InputError

GIB = float(1 << 30)


@dataclass(frozen=True)
class Assumption:
    """A number, what it means, and who says so."""

    value: float
    unit: str
    source: str


@dataclass(frozen=True)
class Hardware:
    """One GPU and the wires around it."""

    name: str
    memory: Assumption
    matrix: Assumption
    bandwidth: Assumption
    link: Assumption
    network: Assumption
    power: Assumption
    idle_power: Assumption
    gpus_per_node: Assumption


SHEET = "vendor's data sheet"
H200 = Hardware(
    "H200",
    memory=Assumption(139.8, "GiB", "reported by the driver"),
    matrix=Assumption(790e12, "FLOP/s", "large bf16 matrix products on this card; the data sheet says 989e12"),
    bandwidth=Assumption(4.3e12, "B/s", "device copy on this card; the data sheet says 4.8e12"),
    link=Assumption(400e9, "B/s", "NVLink into one GPU, as copies reach it; the data sheet says 450e9"),
    network=Assumption(45e9, "B/s", "one 400 Gbit/s adapter a GPU at 90 %"),
    power=Assumption(700, "W", SHEET),
    idle_power=Assumption(90, "W", "typical with a model loaded"),
    gpus_per_node=Assumption(8, "GPUs", "usual server"),
)
H100 = replace(
    H200,
    name="H100",
    memory=Assumption(79.6, "GiB", SHEET),
    matrix=Assumption(700e12, "FLOP/s", "large bf16 matrix products"),
    bandwidth=Assumption(3.0e12, "B/s", "device copy; the data sheet says 3.35e12"),
)
A100 = replace(
    H200,
    name="A100",
    memory=Assumption(79.6, "GiB", SHEET),
    matrix=Assumption(260e12, "FLOP/s", "large bf16 matrix products"),
    bandwidth=Assumption(1.75e12, "B/s", "device copy; the data sheet says 2.0e12"),
    link=Assumption(250e9, "B/s", SHEET),
    network=Assumption(22e9, "B/s", "one 200 Gbit/s adapter a GPU at 90 %"),
    power=Assumption(400, "W", SHEET),
)
HARDWARE = {h.name.lower(): h for h in (H200, H100, A100)}


@dataclass(frozen=True)
class Assumptions:
    """What is not hardware. `advgame plan --assume name=value` overrides any of these, and the hardware's."""

    train_share: Assumption = Assumption(0.45, "of matrix rate", "packed 7B training with recomputed activations")
    prefill_share: Assumption = Assumption(0.5, "of matrix rate", "chunked prefill of long prompts")
    decode_share: Assumption = Assumption(0.7, "of bandwidth", "decode of small batches under captured graphs")
    step_overhead: Assumption = Assumption(1.5e-3, "s", "scheduling and launch of one decode step")
    reduce_latency: Assumption = Assumption(12e-6, "s", "one tensor-parallel all-reduce of a small message")
    driver_request: Assumption = Assumption(0.5e-3, "s", "driver and engine front, one request")
    pause: Assumption = Assumption(0.05, "s", "quiesce, fence, cache reset and resume around a publish")
    seed_tokens: Assumption = Assumption(60, "tokens", "a seed's text")
    instruction_tokens: Assumption = Assumption(250, "tokens", "role instruction of the Attacker")
    rubric_tokens: Assumption = Assumption(
        450, "tokens", "a judge's instruction; cached by the engine, counted once a step"
    )
    attack_tokens: Assumption = Assumption(300, "tokens", "median completion of the Attacker, reasoning included")
    prompt_share: Assumption = Assumption(0.4, "of the completion", "the attack's prompt without its reasoning")
    response_tokens: Assumption = Assumption(300, "tokens", "median completion of the Defender")
    judge_tokens: Assumption = Assumption(500, "tokens", "median completion of a judge, reasoning included")
    sigma: Assumption = Assumption(0.6, "of log length", "log-normal spread of completion lengths")
    valid_share: Assumption = Assumption(0.9, "of attacks", "attacks that parse and are faithful")
    pair_share: Assumption = Assumption(
        0.8, "of candidates", "seeds and attacks whose rewards differ, so that a pair exists"
    )
    checkpoint_factor: Assumption = Assumption(4 / 3, "x", "forward repeated by activation checkpointing")
    reserve: Assumption = Assumption(0.08, "of memory", "fragmentation, buffers of collectives, CUDA context")
    activation_bytes: Assumption = Assumption(
        34, "B a token, hidden unit and layer", "one layer live while it is recomputed"
    )
    carbon: Assumption = Assumption(0.4, "kg CO2e a kWh", "world average grid; state your own")
    overhead_power: Assumption = Assumption(1.5, "x", "host, cooling and network beside the GPU's own draw")

    def items(self) -> Iterator[tuple[str, Assumption]]:
        for field in fields(self):
            yield field.name, getattr(self, field.name)


def override(hardware: Hardware, assumed: Assumptions, words: Mapping[str, str]) -> tuple[Hardware, Assumptions]:
    """`name=value` words over both tables. Raises InputError for an unknown name or a value that is no number."""
    for name, text in words.items():
        try:
            value = float(text)
        except ValueError:
            raise InputError(f"--assume {name}: {text!r} is not a number") from None
        if value <= 0:
            raise InputError(f"--assume {name}: {text} must be above 0")
        if isinstance(old := getattr(assumed, name, None), Assumption):
            assumed = replace(assumed, **{name: replace(old, value=value, source="given by --assume")})
        elif isinstance(old := getattr(hardware, name, None), Assumption):
            hardware = replace(hardware, **{name: replace(old, value=value, source="given by --assume")})  # type: ignore[arg-type]
        else:
            known = [n for n, _ in assumed.items()] + [f.name for f in fields(hardware) if f.name != "name"]
            raise InputError(f"--assume {name}: unknown; known: {', '.join(known)}")
    return hardware, assumed


def calibrate(hardware: Hardware, folder: Path) -> tuple[Hardware, list[str]]:
    """Measured rates in place of assumed ones, from results of the benchmarks on this GPU; says which files it used."""
    used = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if not isinstance(tree, dict) or hardware.name not in str(tree.get("device", "")):
            continue
        source = f"measured: {path.name}"
        if rate := tree.get("copy_bytes_per_s"):
            hardware = replace(hardware, bandwidth=Assumption(float(rate), "B/s", source))
            used.append(f"bandwidth from {path.name}")
        if rate := tree.get("gemm_flops_per_s"):
            hardware = replace(hardware, matrix=Assumption(float(rate), "FLOP/s", source))
            used.append(f"matrix from {path.name}")
    return hardware, used
