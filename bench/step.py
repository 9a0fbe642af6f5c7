"""A training step of one player, ours against the published way, and what each change between them saves:
`python -m bench step [--device cuda] [--size 0.5b|7b] [--out FILE]`.

Both start from the same weights, moving average, optimiser and sampled completions, and must find the same gradients.
Every contender runs in processes of its own, in alternating rounds; memory is the peak of forward and backward above
what weights, moments and averages take. Lengths are drawn as stated below, a quarter of them on a CPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from advgame.run.malloc import keep_freed_memory
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from advgame.game.pairs import Pair
from advgame.game.tree import Sample
from advgame.learn.packing import pack
from bench.floors import HeadShape, three_gemms
from bench.kernels import device_name
from bench.peak import Peak
from bench.step_ways import WAYS, Contender, learner_of

SHAPES = {
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2,
             "vocab_size": 151936, "tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
           "vocab_size": 152064, "tie_word_embeddings": False},
}  # fmt: skip
"""Qwen2.5's shapes, less their depth."""

SEED = 20251220
LENGTHS = "prompts normal, mean 300, deviation 80; completions log-normal, median 300, sigma 0.6, at most 2048"
STATE_BYTES = 4 * 7 + 2
"""A parameter's weight, two moments, average, initial copy, gradient and gradient under way; its bf16 copy."""


def pairs_of(count: int, vocab: int, quarter: bool) -> list[Pair]:
    """Random tokens of the stated lengths; chosen and rejected share their prompt."""
    draw = random.Random(SEED)
    part = 4 if quarter else 1

    def ids(length: float) -> tuple[int, ...]:
        return tuple(draw.randrange(vocab) for _ in range(max(2, round(length / part))))

    def completion(prompt: tuple[int, ...]) -> Sample:
        tokens = ids(min(2048.0, math.exp(draw.gauss(math.log(300), 0.6))))
        return Sample(prompt, tokens, (0.0,) * len(tokens), "stop", 0)

    made = []
    for i in range(count):
        prompt = ids(max(16.0, draw.gauss(300, 80)))
        made.append(Pair(completion(prompt), completion(prompt), 1.0, 0.0, str(i)))
    return made


def config_of(spec: Mapping[str, Any]) -> Qwen2Config:
    return Qwen2Config(**SHAPES[spec["size"]], num_hidden_layers=spec["layers"], max_position_embeddings=32768)


def model_of(spec: Mapping[str, Any]) -> Qwen2ForCausalLM:
    """The same random weights in every process."""
    torch.manual_seed(0)
    with torch.device(spec["device"]):
        return Qwen2ForCausalLM(config_of(spec)).eval()


def child(name: str, task: str, spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What one process does with one contender."""
    device = torch.device(spec["device"])
    pairs = pairs_of(spec["pairs"], SHAPES[spec["size"]]["vocab_size"], device.type == "cpu")
    model = model_of(spec)
    if name == "sampler":
        learner = learner_of(model, spec["dtype"])
        samples = [s for pair in pairs for s in (pair.chosen, pair.rejected)]
        logps = [learner._reference_logps([pack([s], device)], learner.shadow)[0].tolist() for s in samples]
        (folder / "logps.json").write_text(json.dumps(logps))
        return {}
    logps = iter(json.loads((folder / "logps.json").read_text()))
    pairs = [
        replace(p, chosen=replace(p.chosen, logprobs=next(logps)), rejected=replace(p.rejected, logprobs=next(logps)))
        for p in pairs
    ]
    try:
        contender = Contender(name, model, spec["dtype"])
        contender.warm_optimizer()
        keep_freed_memory()  # as a run does: else every large tensor faults its pages in anew
        return timed(contender, pairs, spec["steps"]) if task == "time" else checked(contender, pairs, folder)
    except torch.OutOfMemoryError:
        return {"too_large": True}


def checked(contender: Contender, pairs: Sequence[Pair], folder: Path) -> dict[str, Any]:
    """The peak of forward and backward (AdamW works in place), and the gradients compared."""
    with Peak(contender.model.device) as peak:
        gradients = contender.gradients(pairs)
    return {"peak": peak.bytes, "gap": compare(gradients, folder / "gradients.safetensors")}


def timed(contender: Contender, pairs: Sequence[Pair], steps: int) -> dict[str, Any]:
    """Seconds of whole steps, after one on two pairs."""
    contender.step(pairs[:2])
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        contender.step(pairs)
        if contender.model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds}


def compare(gradients: Mapping[str, Tensor], file: Path) -> float:
    """Largest relative distance of any parameter's gradient from the first contender's, which keeps its own."""
    if not file.exists():
        save_file({n: g.detach().cpu().contiguous() for n, g in gradients.items()}, file)
        return 0.0
    with safe_open(file, framework="pt") as kept:
        assert set(kept.keys()) == set(gradients)
        gaps = []
        for name, gradient in gradients.items():
            theirs = kept.get_tensor(name).to(gradient.device)
            gaps.append(float((gradient - theirs).norm() / theirs.norm()))
    return max(gaps)


def useful_flops(spec: Mapping[str, Any], pairs: Sequence[Pair]) -> float:
    """Forward and backward of what has to be computed: each prompt once, response rows in the head, no reference."""
    config = config_of(spec)
    width, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    layer = width * (2 * width + 2 * head * config.num_key_value_heads) + 3 * width * config.intermediate_size
    tokens = rows = seen = 0
    for pair in pairs:
        batch = pack([pair.chosen, pair.rejected], share=True)
        tokens, rows = tokens + batch.tokens, rows + len(batch.labels)
        seen += sum(s.length * s.shared + s.length * (s.length + 1) // 2 for s in batch.spans)
    attention = 4 * width * seen
    return 3.0 * (config.num_hidden_layers * (2 * tokens * layer + attention) + 2 * rows * width * config.vocab_size)


def layers_that_fit(size: str, device: torch.device, most: int = 28) -> int:
    """Layers whose state leaves half of the GPU's memory to the steps themselves."""
    config = config_of({"size": size, "layers": 1})
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    whole = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    room = 0.5 * torch.cuda.mem_get_info(device)[1] / STATE_BYTES
    return max(1, min(most, int((room - (whole - layer)) // layer)))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench step", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=SHAPES, default="0.5b", help="width, heads and vocabulary")
    parser.add_argument("--layers", type=int, help="depth (default: 2 on a CPU, as many as fit on a GPU)")
    parser.add_argument("--pairs", type=int, help="default: 4 on a CPU, 16 on a GPU")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute (default: bfloat16 on a GPU)")
    parser.add_argument("--rounds", type=int, default=3, help="processes of the published way and of ours, each")
    parser.add_argument("--steps", type=int, default=1, help="measured steps of a process")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--launch", default="", help="a command before each timed process, such as 'numactl -N 0'")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--task", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.child:
        spec = json.loads((chosen.folder / "spec.json").read_text())
        print(json.dumps(child(chosen.child, chosen.task, spec, chosen.folder)))
        return 0

    device = torch.device(chosen.device)
    gpu = device.type == "cuda"
    spec = {
        "device": chosen.device, "size": chosen.size, "steps": chosen.steps,
        "pairs": chosen.pairs or (16 if gpu else 4),
        "layers": chosen.layers or (layers_that_fit(chosen.size, device) if gpu else 2),
        "dtype": chosen.dtype or ("bfloat16" if gpu else "float32"),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as made:
        result = measure(spec, Path(made), chosen.ways, chosen.rounds, shlex.split(chosen.launch))
    if chosen.out is not None:
        chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure(
    spec: dict[str, Any], folder: Path, ways: Sequence[str], rounds: int, launch: Sequence[str]
) -> dict[str, Any]:
    """Runs all processes, prints the table, returns what goes into the file."""
    (folder / "spec.json").write_text(json.dumps(spec))

    def run(name: str, task: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "bench", "step", "--child", name, "--task", task, "--folder", str(folder)]
        done = subprocess.run(
            [*launch, *command] if task == "time" else command, stdout=subprocess.PIPE, text=True, check=True
        )
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}, {task}: {result}", file=sys.stderr, flush=True)
        return result

    run("sampler", "check")
    checks = {name: run(name, "check") for name in ways}
    fitting = [name for name in ways if "too_large" not in checks[name]]
    seconds: dict[str, list[float]] = {name: [] for name in fitting}
    for number in range(rounds):
        for name in fitting:
            if number == 0 or name in ("published", "ours"):
                seconds[name] += run(name, "time")["seconds"]

    device = torch.device(spec["device"])
    config = config_of(spec)
    shape = HeadShape(4096 if device.type == "cuda" else 256, config.vocab_size, config.hidden_size)
    rate = shape.flops / (three_gemms(shape, getattr(torch, spec["dtype"]), device, 3) / 1e3)
    pairs = pairs_of(spec["pairs"], config.vocab_size, device.type == "cpu")
    samples = [s for pair in pairs for s in (pair.chosen, pair.rejected)]
    tokens = sum(len(s.prompt_ids) + len(s.token_ids) for s in samples)
    flops = useful_flops(spec, pairs)
    table: dict[str, dict[str, float]] = {}
    for name in fitting:
        middle = statistics.median(seconds[name])
        table[name] = {
            "seconds": middle, "least": min(seconds[name]), "most": max(seconds[name]),
            "tokens_per_second": tokens / middle, "utilisation": flops / middle / rate,
            "peak_bytes": checks[name]["peak"], "gradient_gap": checks[name]["gap"],
        }  # fmt: skip
    for name in sorted(set(ways) - set(fitting)):
        print(f"{name}: does not fit into memory")
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "device": device_name(device),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "spec": spec, "seed": SEED,
        "lengths": LENGTHS + (", a quarter of each" if device.type == "cpu" else ""),
        "prompt_tokens": sum(len(p.chosen.prompt_ids) for p in pairs),
        "response_tokens": sum(len(s.token_ids) for s in samples),
        "gemm_flops_per_second": rate, "useful_flops": flops, "ways": table,
    }  # fmt: skip
    print(report(result))
    limit = 1e-4 if spec["dtype"] == "float32" else 5e-2
    worst = max(row["gradient_gap"] for row in table.values())
    assert worst <= limit, f"gradients differ by {worst:.1e} of their size, more than {limit:.0e}"
    return result


def report(result: Mapping[str, Any]) -> str:
    """The result as a waterfall: each line has one change more than the line above it."""
    spec, ways = result["spec"], result["ways"]
    lines = [
        f"{result['device']}, {result['threads']} threads, torch {result['torch']}",
        f"{spec['size']}-shaped, {spec['layers']} layers, {spec['dtype']}; {spec['pairs']} pairs, "
        f"{result['prompt_tokens']} prompt and {result['response_tokens']} response tokens; {result['lengths']}, "
        f"seed {result['seed']}",
        f"GEMM rate {result['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s, a step needs "
        f"{result['useful_flops'] / 1e12:.2f} TFLOP",
        f"  {'':30}{'s':>8}{'saved':>8}{'tokens/s':>10}{'MFU':>6}{'peak MiB':>10}{'gradient gap':>14}",
    ]
    before = None
    for name, row in ways.items():
        alone = before is None or name.startswith("published")
        saved = "" if alone or before is None else f"{before - row['seconds']:.2f}"
        before = row["seconds"]
        lines.append(
            f"  {name:30}{row['seconds']:8.2f}{saved:>8}{row['tokens_per_second']:10.1f}{row['utilisation']:6.0%}"
            f"{row['peak_bytes'] / 2**20:10.0f}{row['gradient_gap']:14.1e}"
        )
    if {"published", "ours"} <= set(ways):
        faster = ways["published"]["seconds"] / ways["ours"]["seconds"]
        less = ways["ours"]["peak_bytes"] / ways["published"]["peak_bytes"]
        lines.append(f"ours: {faster:.2f} times as fast as published, {less:.3f} of its peak memory")
    return "\n".join(lines)
