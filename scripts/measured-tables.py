"""Fills the measured tables of README and docs from bench/results: scripts/measured-tables.py [--check].

A table stands between `<!-- measured: NAME -->` and `<!-- end -->`; NAME is a function of `TABLES`, and the newest file
of its benchmark is read. No figure of such a table is written by hand.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from advgame.lab.command import markdown  # noqa: E402
from advgame.lab.results import judge_claims, rows_of_json  # noqa: E402
from bench.gpu_table import gpu_table  # noqa: E402

RESULTS = ROOT / "bench" / "results"
PAGES = ("README.md", "kernels/README.md", "docs/step.md", "docs/vllm.md", "docs/game.md", "docs/cluster.md",
         "docs/planning.md", "docs/lab.md")  # fmt: skip
BLOCK = re.compile(r"(<!-- measured: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

Result = dict[str, Any]


def rows(head: list[str], body: list[list[str]]) -> list[str]:
    """A Markdown table, all columns but the first to the right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *body]
    return ["| " + " | ".join(line) + " |" for line in lines]


def mib(size: float | None) -> str:
    return "" if size is None else f"{size / 2**20:.0f}"


def kernels(result: Result) -> list[str]:
    """Preference loss by dtype, then the log-prob pass."""
    lines = []
    for name, part in result.items():
        if name.startswith("preference: "):
            ours = next(iter(part["timings"].values()))["milliseconds"]
            body = [
                [who, f"{t['milliseconds']:.0f}", f"{t['milliseconds'] / ours:.2f}",
                 f"{t['milliseconds'] / part['floor_ms']:.2f}", f"{t['spread']:.0%}", mib(t["extra_bytes"])]
                for who, t in part["timings"].items()
            ]  # fmt: skip
            least = part["floor_ms"]
            floor = ["*three bare GEMMs (floor)*", f"{least:.0f}", f"{least / ours:.2f}", "1", "", ""]
            lines += [f"Preference loss, forward and backward: {name.removeprefix('preference: ')}.", ""]
            lines += [*rows(["", "ms", "× ours", "× floor", "spread", "extra MiB"], [floor, *body]), ""]
    body = []
    for name, part in result.items():
        if name.startswith("logprobs: "):
            cells = {who: f"{t['milliseconds']:.0f}" for who, t in part["forward"].items()}
            others = ", ".join(f"{who} {cell}" for who, cell in cells.items() if who != "ours")
            dtype = name.removeprefix("logprobs: ")
            body.append(
                [f"{part['rows']} × {part['vocab']}, {dtype}", cells["ours"], f"{part['share_of_copy']:.0%}", others]
            )
    lines += ["Log-prob, entropy and log-sum-exp of logits, forward, ms.", ""]
    return [*lines, *rows(["", "ours", "of copy bandwidth", "others"], body)]


def ema(result: Result) -> list[str]:
    """The average with its converted copy, of one model."""
    part = result["100m"]
    rates = (part["copy_bytes_per_s"], part["in_place_bytes_per_s"])
    least = [1e3 * part["bytes"] / rate for rate in rates]
    body = [
        [who, f"{t['milliseconds']:.0f}", *(f"{floor / t['milliseconds']:.0%}" for floor in least)]
        for who, t in part["timings"].items()
    ]
    head = [
        "",
        "ms",
        *(f"of {rate / 1e9:.1f} GB/s, {what}" for rate, what in zip(rates, ("copy", "in place"), strict=True)),
    ]
    title = (
        f"{part['parameters'] / 1e6:.0f} M parameters, float32 average and bfloat16 copy: {part['bytes'] / 1e9:.2f} GB "
        f"moved, {least[0]:.0f} ms at the rate of torch's copy, {least[1]:.0f} ms at that of an update in place."
    )
    return [title, "", *rows(head, body)]


def publish(result: Result) -> list[str]:
    """A publish into a live vLLM engine, by way."""
    ways = result["publish_ms"]
    ours = next(iter(ways.values()))
    body = [
        [
            who,
            f"{w['total']:.0f}",
            f"{w['delivery']:.0f}",
            f"{w['total'] / ours['total']:.1f}",
            f"{w['delivery'] / ours['delivery']:.1f}",
        ]
        for who, w in ways.items()
    ]
    title = (
        f"{result['parameters'] / 1e6:.0f} M parameters, vLLM {result['vllm']}; the average's own pass takes "
        f"{result['average_ms']:.0f} ms of each."
    )
    return [title, "", *rows(["", "whole, ms", "delivery, ms", "× ours, whole", "× ours, delivery"], body)]


def step(result: Result) -> list[str]:
    """The waterfall of one step."""
    body = [
        [
            who,
            f"{w['seconds']:.2f}",
            f"{w['tokens_per_second']:.0f}",
            f"{w['utilisation']:.0%}",
            mib(w["peak_bytes"]),
            f"{w['gradient_gap']:.0e}",
        ]
        for who, w in result["ways"].items()
    ]
    case = result["case"]
    title = (
        f"{case['size']}-shaped head, {case['layers']} layers, {case['dtype']}, {case['pairs']} pairs; "
        f"{result['lengths']}, seed {result['seed']}. "
        f"Ours: {result['times_as_fast']:.2f} times as fast as the published way, "
        f"{result['share_of_peak']:.2f} of its peak memory."
    )
    return [title, "", *rows(["", "s", "tokens/s", "of GEMM rate", "peak MiB", "gradient gap"], body)]


def play(result: Result) -> list[str]:
    """Play with and without barriers."""
    body = [[who, f"{m['seconds']:.2f}", f"{m['trees_per_hour']:.0f}"] for who, m in result["median"].items()]
    ratio = f"{result['ratio']:.2f} times the trees a second"
    title = f"{result['trees']} trees a round, log-normal lengths, the same trees: {ratio} without barriers."
    return [title, "", *rows(["", "s", "trees an hour"], body)]


def loop(result: Result) -> list[str]:
    """Whole steps of the tiny world, in step and ahead."""
    made = result["result"]
    ways = {way: row for way, row in made.items() if isinstance(row, dict) and "wall" in row}
    parts = ("wall", "play", "learn", "hidden")
    body = [[way, *(f"{row[part]:.1f}" for part in parts), f"{row['trees_per_hour']:.0f}"] for way, row in ways.items()]
    title = (
        f"{result['config']}, {result['steps']} steps, {result['seeds']} seeds: `run.ahead: 1` hides "
        f"{made['hidden_share']:.0%} of the shorter of play and learning."
    )
    figures = [
        [
            name,
            f"{f['in step']:.3f}",
            f"{f['ahead']:.3f}",
            "" if f["standard_error"] is None else f"{f['standard_error']:.3f}",
        ]
        for name, f in made["figures"].items()
    ]
    return [
        title, "", *rows(["median run, seconds", "wall", "play", "learn", "hidden", "trees an hour"], body), "",
        *rows(["mean at the end", "in step", "ahead", "standard error of the difference"], figures),
    ]  # fmt: skip


def driver(result: Result) -> list[str]:
    """The driver's own processor time, by trees in flight."""
    body = [
        [trees, f"{r['ours']:.3f}", f"{r['tokenizer']:.3f}", f"{r['event loop and engine']:.3f}"]
        for trees, r in result["result"].items()
    ]
    title = f"Processor milliseconds a request; {result['requests_a_tree']} requests a tree."
    return [title, "", *rows(["trees in flight", "ours", "tokenizer", "event loop"], body)]


def fronts(result: Result) -> list[str]:
    """What engines cost the driver's process."""
    title = f"Processor milliseconds of the driver's process a request; {result['requests']} at once."
    body = [[name, f"{milliseconds:.2f}"] for name, milliseconds in result["result"].items()]
    return [title, "", *rows(["engine", "ms"], body)]


def simulate(result: Result) -> list[str]:
    """The simulation's step against the measured one of a layout that it was not told of."""
    made = result["result"]
    stages = list(made["measured"])

    def row(what: str, layout: str, seconds: dict[str, float]) -> list[str]:
        seeds, defenders = made["layouts"][layout]
        cells = [sum(seconds.values()), *(seconds[stage] for stage in stages)]
        return [what, str(2 * seeds), str(defenders), *(f"{cell:.3f}" for cell in cells)]

    body = [row("measured, fitted to", name, seconds) for name, seconds in made["fitted_to"].items()]
    *_, other = made["layouts"]
    body += [row("**simulated**", other, made["predicted"]), row("**measured**", other, made["measured"])]
    title = f"Simulated over measured: {made['ratio']:.2f} of a step, {made['play_ratio']:.2f} of its play."
    return [title, "", *rows(["seconds of a step", "trees", "Defenders", "step", *stages], body)]


def soak(result: Result) -> list[str]:
    """What was done to a run, and what was wrong with it."""
    made = result["result"]
    body = [[f"killed {how}", str(count)] for how, count in made["kills"].items()]
    body += [["steps played again", str(made["played_again"])], ["trees recorded", str(made["trees"])]]
    body += [["wrong in the run's folder", str(len(made["problems"]))], ["left behind", str(len(made["leaks"]))]]
    if "twin_differs" in made:
        body.append(
            ["rows, trees, tensors that differ from those of a run without kills", str(len(made["twin_differs"]))]
        )
    return [f"{result['steps']} steps of {result['config']}, {made['starts']} starts.", "", *rows(["", ""], body)]


def read(name: str) -> tuple[Path, Result] | None:
    """The last file of a table's benchmark by the date in its name, and what is in it; None if it never ran."""
    found = sorted(RESULTS.glob(TABLES[name][1]), key=lambda path: (path.stem[-10:], path.name))
    return (found[-1], json.loads(found[-1].read_text(encoding="utf-8"))) if found else None


def summary() -> list[str]:
    """One line a benchmark, for the front page."""
    body = []
    for name, lines in LINES.items():
        if (found := read(name)) is not None:
            link = f"[`bench {TABLES[name][0]}`](bench/results/{found[0].name})"
            body += [[*line, link] for line in lines(found[1])]
    return rows(["on two CPU cores", "ours", "against", "source"], body)


def kernels_lines(result: Result) -> list[list[str]]:
    rivals = ("eager torch", "eager torch, all rows", "TRL, chunked log-probs", "Liger, fused linear DPO")
    lines = []
    for name, part in result.items():
        if name.startswith("preference: "):
            seconds = {who: t["milliseconds"] / 1e3 for who, t in part["timings"].items()}
            against = ", ".join(f"{who} {seconds[who]:.1f}" for who in rivals if who in seconds)
            what = f"DPO loss and gradients, V {part['case']['vocab']}, {part['case']['dtype']}, s"
            lines.append([what, f"{next(iter(seconds.values())):.1f}", against])
    return lines


def ema_lines(result: Result) -> list[list[str]]:
    part = result["100m"]
    times = {who: t["milliseconds"] for who, t in part["timings"].items()}
    what = f"EMA + bfloat16 copy, {part['parameters'] / 1e6:.0f} M parameters, ms"
    against = f"its bytes copied {part['floor_ms']:.0f}, lerp + cast + copy {times['foreach lerp, cast, copy']:.0f}"
    return [[what, f"{times['ours']:.0f}", against]]


def publish_lines(result: Result) -> list[list[str]]:
    ways = list(result["publish_ms"].items())
    what = f"EMA published into live vLLM, {result['parameters'] / 1e6:.0f} M parameters, ms"
    return [[what, f"{ways[0][1]['total']:.0f}", ", ".join(f"{who} {way['total']:.0f}" for who, way in ways[1:5])]]


def step_lines(result: Result) -> list[list[str]]:
    seconds = {who: way["seconds"] for who, way in result["ways"].items()}
    against = f"published way {seconds['published']:.1f}; ours in {result['share_of_peak']:.0%} of its peak memory"
    return [["one training step, 0.5B-shaped head, s", f"{seconds['ours']:.1f}", against]]


def play_lines(result: Result) -> list[list[str]]:
    middle = {who: m["seconds"] for who, m in result["median"].items()}
    what = f"play of {result['trees']} trees on vLLM, long-tailed lengths, s"
    return [[what, f"{middle['no barriers']:.1f}", f"stage by stage {middle['stage by stage']:.1f}"]]


def lab(result: Result) -> list[str]:
    """As `advgame lab` writes it."""
    found = rows_of_json(result)
    return markdown(found, judge_claims(found), result["commits"], result["steps"]).splitlines()


def loop_lines(result: Result) -> list[list[str]]:
    made = result["result"]
    what = f"{result['steps']} steps of the tiny world, `run.ahead: 1`, s"
    return [[what, f"{made['ahead']['wall']:.0f}", f"in step {made['in step']['wall']:.0f}"]]


def driver_lines(result: Result) -> list[list[str]]:
    worst = max(row["ours"] for row in result["result"].values())
    most = list(result["result"])[-1]
    what = f"the driver's own Python, at most, up to {most} trees in flight, ms a request"
    return [[what, f"{worst:.3f}", f"mark {result['mark_ms']}"]]


LINES: dict[str, Callable[[Result], list[list[str]]]] = {
    "kernels-cpu": kernels_lines, "ema-cpu": ema_lines, "publish-cpu": publish_lines, "step-cpu": step_lines,
    "play-cpu": play_lines, "loop-cpu": loop_lines, "driver-cpu": driver_lines,
}  # fmt: skip
"""What the front page says of each table."""

TABLES: dict[str, tuple[str, str, Callable[[Result], list[str]]]] = {
    "kernels-cpu": ("kernels", "kernels-cpu-*.json", kernels),
    "kernels-gpu": ("kernels", "kernels-nvidia-*.json", gpu_table),
    "ema-cpu": ("ema", "ema-cpu-*.json", ema),
    "publish-cpu": ("publish", "publish-cpu-*.json", publish),
    "step-cpu": ("step", "step-0.5b-cpu-*.json", step),
    "play-cpu": ("play", "play-3-engines-cpu-*.json", play),
    "loop-cpu": ("loop", "loop-tiny-cpu-*.json", loop),
    "driver-cpu": ("driver", "driver-cpu-*.json", driver),
    "fronts-cpu": ("fronts", "fronts-cpu-*.json", fronts),
    "simulate-cpu": ("simulate", "simulate-cpu-*.json", simulate),
    "simulate-ray-cpu": ("simulate --ray", "simulate-ray-cpu-*.json", simulate),
    "lab-full-easy": ("lab", "lab-full-easy-cpu-*.json", lab),
    "soak-cpu": ("soak", "soak-transformers-cpu-*.json", soak),
}
"""Name of a table: benchmark, its files, what is made of one."""


def block(name: str, page: Path) -> str:
    """The text of one table, with its source."""
    if name == "summary":
        return "\n".join([*summary(), ""])
    bench, _, made = TABLES[name]
    found = read(name)
    if found is None and name == "kernels-gpu":
        return "\n".join([*gpu_table(None), "", "`make bench-gpu` fills the last column.", ""])
    command = "advgame lab --full --worlds easy" if bench == "lab" else f"python -m bench {bench}"
    if found is None:
        out = "" if bench == "lab" else " --out"
        return f"`{command}{out}` fills this table; no run on an idle machine is on record yet.\n"
    path, result = found
    threads = f", {result['threads']} threads" if "threads" in result else ""
    device = f"; {result['device']}{threads}, torch {result['torch']}" if "device" in result else ""
    link = os.path.relpath(path, page.parent) if page.parent == ROOT else path.name
    where = f"[{path.name}]({link})" if page.parent == ROOT else f"`bench/results/{path.name}`"
    return "\n".join([*made(result), "", f"Source: `{command}`, {where}{device}.", ""])


def filled(page: Path) -> str:
    """A page's text with its tables renewed."""
    text = page.read_text(encoding="utf-8")
    return BLOCK.sub(lambda match: match[1] + block(match[2], page) + match[3], text)


if __name__ == "__main__":
    stale = [page for page in map(ROOT.joinpath, PAGES) if page.read_text(encoding="utf-8") != filled(page)]
    if "--check" in sys.argv:
        sys.exit("".join(f"{page.relative_to(ROOT)} is out of date; run {sys.argv[0]}\n" for page in stale) or 0)
    for page in stale:
        page.write_text(filled(page), encoding="utf-8")
