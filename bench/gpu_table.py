"""The kernels' marks on a GPU as a table: floors of an H200, and what a run measured, empty until there is one.

Imports nothing but the standard library, since the documents are filled without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

ROWS, VOCAB, WIDTH = 8192, 128_256, 4096  # response rows of an 8 B model's head, as `--device cuda` takes them
FLOPS, BYTES = 790e12, 4.3e12  # a second: cuBLAS's products in bfloat16, a copy's reads and writes
CHUNK = 1 << 30  # bytes of logits, as advgame_kernels.head has them on CUDA
GEMMS = 6.0 * ROWS * VOCAB * WIDTH / FLOPS * 1e3  # ms
LOGITS = ROWS * VOCAB / BYTES * 1e3  # ms a byte of each logit

Result = Mapping[str, Any]
Reader = Callable[[Result], float | None]


def _mark(what: str, of: str = "preference: ") -> Reader:
    """The measured ratio of a mark of bench/marks.py."""
    return lambda result: next(
        (m["measured"] for m in result["marks"] if m["of"].startswith(of) and m["what"] == what), None
    )


def _floor(result: Result) -> float | None:
    return next((part["floor_ms"] for name, part in result.items() if name.startswith("preference: ")), None)


def _other_peers(result: Result) -> float | None:
    """Against the fastest of all who compute token losses."""
    named = ("TRL", "Liger")
    head = "ours, bfloat16 logits: times as fast as "
    found = [
        m["measured"] for m in result["marks"]
        if m["what"].startswith(head) and not m["what"].removeprefix(head).startswith(named)
    ]  # fmt: skip
    return min(found, default=None)


def lines() -> list[tuple[str, str, str, str, Reader]]:
    """What, floor, mark, the unit of what is measured, and where a result has it."""
    narrow, wide = (2 + 2 + 2) * LOGITS, (4 + 4 + 2) * LOGITS  # statistics read; gradients read and write
    room = (CHUNK + 4 * VOCAB * WIDTH) / 2**30
    ours = "ours, bfloat16 logits"
    return [
        ("three bare GEMMs", f"{GEMMS:.1f} ms", "", " ms", _floor),
        ("preference loss, bfloat16 logits", f"{GEMMS + narrow:.1f} ms: {1 + narrow / GEMMS:.2f} × the GEMMs",
         "≤ 1.08 ×", " ×", _mark(f"{ours}: time, three bare GEMMs = 1")),
        ("preference loss, float32 logits", f"{GEMMS + wide:.1f} ms: {1 + wide / GEMMS:.2f} × the GEMMs",
         "≤ 1.16 ×", " ×", _mark("ours, float32 logits: time, three bare GEMMs = 1")),
        ("times as fast as TRL, chunked log-probs", "four GEMMs to three: 1.33 ×", "≥ 1.2 ×", " ×",
         _mark(f"{ours}: times as fast as TRL, chunked log-probs")),
        ("times as fast as Liger, fused linear DPO", "", "> 1 ×", " ×",
         _mark(f"{ours}: times as fast as Liger, fused linear DPO")),
        ("times as fast as the fastest peer's token loss", "", "> 1 ×", " ×", _other_peers),
        ("log-prob pass, bfloat16, share of copy bandwidth", f"{2 * LOGITS:.2f} ms: 1", "≥ 0.9", "",
         _mark("log-prob pass: share of copy bandwidth", "logprobs: bfloat16")),
        ("extra memory, one chunk + float32 dWeight = 1", f"{room:.2f} GiB: 1", "≤ 1.1", "",
         _mark(f"{ours}: extra memory, one chunk + float32 dWeight = 1")),
        ("margin error, float32 logits, eager's = 1", "0", "< 1", "",
         _mark("ours, float32 logits (default): margin error, eager's = 1", "margins")),
    ]  # fmt: skip


def gpu_table(result: Result | None) -> list[str]:
    """Title and body of the table as Markdown; the last column is empty without a result."""
    device = "not measured yet" if result is None else result["device"]
    title = (
        f"Forward and backward at {ROWS} response rows, vocabulary {VOCAB}, width {WIDTH}, bfloat16; floors of an H200 "
        f"at {FLOPS / 1e12:.0f} TFLOP/s and {BYTES / 1e12:.1f} TB/s."
    )
    head = ["", "floor", "mark", device]
    body = []
    for what, floor, mark, unit, read in lines():
        found = None if result is None else read(result)
        body.append([what, floor, mark, "" if found is None else f"{found:.2f}{unit}"])
    return [title, "", *("| " + " | ".join(row) + " |" for row in [head, ["---", "--:", "--:", "--:"], *body])]
