"""Compiles every Triton kernel of the package for a GPU that need not be there, and reports registers and spills.

`python -m advgame_kernels.aot [--capability 90]` prints one JSON line a kernel variant. `spills` is the local
memory of the compiled binary in bytes a thread, as cuobjdump reads it from the cubin: zero is demanded of every
kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from advgame_kernels import ema_triton, passes_triton, policy_triton, preference_triton, sums_triton

_TYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
POINTERS = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16"}


@dataclass(frozen=True)
class Variant:
    """One kernel with its argument types and compile-time constants, as a launch would specialise it."""

    name: str
    kernel: Any
    types: dict[str, str]  # argument -> Triton type
    constants: dict[str, Any]
    divisible: tuple[str, ...] = ()  # arguments known to be multiples of 16
    options: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What the compiler made of a variant."""

    name: str
    registers: int  # a thread
    spills: int  # bytes of local memory a thread, stack included
    shared: int  # bytes a program


def variants() -> Iterator[Variant]:
    """Every kernel in the forms that the library launches."""
    row = {"vocab": "i32", "stride": "i32", "temperature": "fp32", "inv_temperature": "fp32", "softcap": "fp32"}
    options = {"num_warps": passes_triton.WARPS}
    for logits in ("fp32", "bf16"):
        for softcap in (False, True):
            types = {
                "logits": POINTERS[logits],
                "labels": "*i64",
                **dict.fromkeys(("logps", "entropy"), "*fp32"),
                "lse": "*fp64",
            }
            yield Variant(
                f"row_stats[{logits}{', softcap' if softcap else ''}]", passes_triton.row_stats_kernel, types | row,
                {"SOFTCAP": softcap, "BLOCK": passes_triton.BLOCK},
                ("logits", "vocab", "stride"), options,
            )  # fmt: skip
    vectors = ("entropy", "lse", "d_logps", "d_entropy", "d_lse")
    for logits, grads in (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")):
        for every in (False, True):
            types = {
                "logits": POINTERS[logits],
                "grads": POINTERS[grads],
                "labels": "*i64",
                **dict.fromkeys(vectors, "*fp32"),
            }
            yield Variant(
                f"row_grads[{logits} to {grads}{', all terms and softcap' if every else ''}]",
                passes_triton.row_grads_kernel, types | row | {"grad_stride": "i32"},
                {"HAS_LOGPS": True, "HAS_ENTROPY": every, "HAS_LSE": every, "SOFTCAP": every, "NARROW": logits != grads,
                 "BLOCK": passes_triton.BLOCK},
                ("logits", "grads", "vocab", "stride", "grad_stride"), options,
            )  # fmt: skip
    for shadow, param, publish in (
        ("fp32", "fp32", "bf16"), ("fp32", "fp32", None), ("fp32", "bf16", "bf16"), ("stochastic", "fp32", "bf16"),
        ("compensated", "fp32", "bf16"),
    ):  # fmt: skip
        constants = {
            "SHADOW": _TYPES["fp32" if shadow == "fp32" else "bf16"],
            "COMPENSATED": shadow == "compensated",
            "STOCHASTIC": shadow == "stochastic", "PARAM": _TYPES[param], "PUBLISH": _TYPES[publish or "fp32"],
            "HAS_PUBLISH": publish is not None, "ALIGNED": True, "BISECTIONS": 9, "BLOCKS": ema_triton.BLOCKS,
            "BLOCK": ema_triton.BLOCK,
        }  # fmt: skip
        yield Variant(
            f"ema[{shadow}, {param} to {publish}]", ema_triton.ema_kernel,
            {"table": "*i64", "step": "*fp32", "seed": "i32", "tensors": "i32"},
            constants, ("table", "step"), ema_triton.OPTIONS,
        )  # fmt: skip
    for words in (True, False):
        yield Variant(
            f"sums[{'words' if words else 'bytes'}]", sums_triton.sums_kernel,
            {"table": "*i64", "out": "*i64", "tensors": "i32"},
            {"WORDS": words, "BISECTIONS": 9, "BLOCKS": sums_triton.BLOCKS, "BLOCK": sums_triton.BLOCK},
            ("table", "out"), sums_triton.OPTIONS,
        )  # fmt: skip
    pointers = {"logps": "*fp32", "entropy": "*fp32", "bounds": "*i64", "counts": "*i64", "ref": "*fp32",
                "scale": "*fp64", "terms": "*fp64", "d_logps": "*fp32", "d_entropy": "*fp32"}  # fmt: skip
    scalars = ("beta", "smoothing", "gamma", "tau", "ceiling", "nll_weight", "entropy_weight")
    for code, kind in enumerate(preference_triton.KINDS):
        constants = {
            "KIND": code, "ROBUST": False, "AVERAGE": False, "USES_REF": True, "HAS_REF": True, "HAS_ENTROPY": True,
            "ENTROPY_TERM": kind == "sigmoid", "GRADS": True, "BLOCK": preference_triton.BLOCK,
        }  # fmt: skip
        yield Variant(
            f"pair[{kind}]", preference_triton.pair_kernel,
            pointers | {"first_row": "i32"} | dict.fromkeys(scalars, "fp32"), constants, ("terms",),
            {"num_warps": preference_triton.WARPS},
        )  # fmt: skip
    tokens = dict.fromkeys(("logps", "advantages", "weights", "ref", "old", "sampler", "d_logps"), "*fp32")
    constants = {"BLOCK": policy_triton.BLOCK} | dict.fromkeys(
        ("HAS_REF", "HAS_OLD", "HAS_SAMPLER", "CLIP", "TRUNCATE", "GRADS"), True
    )
    types = (
        tokens | {"terms": "*fp64", "count": "i32"} | dict.fromkeys(("kl_beta", "low", "high", "truncation"), "fp32")
    )
    options = {"num_warps": policy_triton.WARPS}
    yield Variant("token[everything]", policy_triton.token_kernel, types, constants, (), options)


def compile_variant(variant: Variant, capability: int) -> Report:
    """Compile for `capability` (90: Hopper) and read the resources from the binary."""
    names = variant.kernel.arg_names
    signature = {n: "constexpr" if n in variant.constants else variant.types[n] for n in names}
    constants = {(names.index(k),): v for k, v in variant.constants.items()}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in variant.divisible}
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=variant.options)
    registers, local = resources(compiled.asm["cubin"])
    return Report(variant.name, registers, local, compiled.metadata.shared)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory (stack included) of the one kernel in a cubin."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def main() -> int:
    """Print a report a line; exit 1 if anything spills."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, default=90, help="compute capability without the dot")
    arguments = parser.parse_args()
    reports = [compile_variant(v, arguments.capability) for v in variants()]
    for report in reports:
        print(json.dumps(asdict(report)))
    return int(any(r.spills for r in reports))


if __name__ == "__main__":
    sys.exit(main())
