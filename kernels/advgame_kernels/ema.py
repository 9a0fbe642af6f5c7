"""Exponential moving average of a model's weights, in place, with the published copy written in the same pass.

The shadow is float32 unless asked otherwise. In bfloat16, rounding to nearest swallows every step below half an
ulp: at decay 0.95 a weight moves only when player and shadow differ by 4 to 8 % of its size, so the average would
never follow a 1e-6 learning rate. Floor: 4 + 4 + 4 + 2 = 14 bytes a parameter (read a float32 player, read and
write the shadow, write a bf16 copy).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from advgame_kernels import native, passes
from advgame_kernels._checks import FLOATS, describe, one_of, refuse
from advgame_kernels.ema_bf16 import compensated_update_, stochastic_update_
from advgame_kernels.passes import IMPLS


def ema_update_ref_(
    shadow: Sequence[Tensor],
    params: Sequence[Tensor],
    decay: float | Tensor,
    *,
    publish: Sequence[Tensor | None] | None = None,
    compensation: Sequence[Tensor] | None = None,
    seed: int | None = None,
    impl: str = "auto",
) -> None:
    """The same as `ema_update_`, one tensor at a time in plain torch."""
    step = _step(decay)
    generators: dict[torch.device, torch.Generator] = {}
    with torch.no_grad():
        for i, (s, p) in enumerate(zip(shadow, params, strict=True)):
            factor = step.to(s.device) if isinstance(step, Tensor) else step
            if compensation is not None:
                compensated_update_(s, p, factor, compensation[i])
            elif seed is not None:
                if s.device not in generators:
                    generators[s.device] = torch.Generator(s.device).manual_seed(seed)
                stochastic_update_(s, p, factor, generators[s.device])
            else:
                s.add_((p.detach().to(s.dtype) - s).mul_(factor))
            out = None if publish is None else publish[i]
            if out is not None:
                out.copy_(s)


def _step(decay: float | Tensor) -> float | Tensor:
    """1 − decay, a tensor staying on its device."""
    if isinstance(decay, Tensor):
        return (1.0 - decay.detach().double()).to(torch.float32).reshape(())
    return 1.0 - decay


def _check(
    shadow: Sequence[Tensor],
    params: Sequence[Tensor],
    decay: float | Tensor,
    publish: Sequence[Tensor | None] | None,
    compensation: Sequence[Tensor] | None,
    seed: int | None,
) -> None:
    if compensation is not None and seed is not None:
        refuse("seed", "None where compensation is given: a bfloat16 shadow takes one of the two", seed)
    narrow = compensation is not None or seed is not None
    if compensation is not None and len(compensation) != len(shadow):
        refuse("compensation", f"{len(shadow)} tensors, as many as shadow", len(compensation))
    if len(shadow) != len(params):
        refuse("params", f"{len(shadow)} tensors, as many as shadow", len(params))
    if publish is not None and len(publish) != len(shadow):
        refuse("publish", f"{len(shadow)} entries, as many as shadow", len(publish))
    if isinstance(decay, Tensor):
        if decay.numel() != 1 or not decay.is_floating_point():
            refuse("decay", "a number or a floating-point tensor with one element", describe(decay))
    elif not 0.0 <= decay <= 1.0:
        refuse("decay", "a number in [0, 1]", decay)
    for i, (s, p) in enumerate(zip(shadow, params, strict=True)):
        if s.dtype != (torch.bfloat16 if narrow else torch.float32):
            expected = "a bfloat16 tensor" if narrow else "a float32 tensor (bfloat16 with compensation or seed)"
            refuse(f"shadow[{i}]", expected, describe(s))
        out = None if publish is None else publish[i]
        kept = None if compensation is None else compensation[i]
        if kept is not None and (kept.dtype != torch.bfloat16 or kept.shape != s.shape or kept.device != s.device):
            refuse(f"compensation[{i}]", f"a bfloat16 tensor {tuple(s.shape)} on {s.device}", describe(kept))
        for name, x in ((f"params[{i}]", p), (f"publish[{i}]", out)):
            if x is None:
                continue
            if x.shape != s.shape or x.dtype not in FLOATS or x.device != s.device:
                refuse(name, f"a floating-point tensor {tuple(s.shape)} on {s.device}", describe(x))
        for name, x in (
            (f"shadow[{i}]", s), (f"params[{i}]", p), (f"publish[{i}]", out), (f"compensation[{i}]", kept),
        ):  # fmt: skip
            if x is not None and not x.is_contiguous():
                refuse(name, "a contiguous tensor", f"stride {x.stride()}")


def ema_update_(
    shadow: Sequence[Tensor],  # float32, contiguous; bfloat16 with compensation or seed
    params: Sequence[Tensor],  # any float dtype, the shapes and devices of shadow
    decay: float | Tensor,  # in [0, 1]; a 0-d tensor is read on its device
    *,
    publish: Sequence[Tensor | None] | None = None,  # any float dtype, the shapes of shadow
    compensation: Sequence[Tensor] | None = None,  # bfloat16, the shapes of shadow; updated
    seed: int | None = None,
    impl: str = "auto",
) -> None:
    """shadow += (1 − decay) · (params − shadow), in place, over a whole model; `publish` receives the new shadow.

    `publish` entries are converted with round-to-nearest-even and written while the new shadow is still at hand;
    None skips one. On the CPU one C++ pass over all cores serves float32 and bfloat16 tensors. A float32 shadow comes
    out the same from every implementation to the last bit.

    A bfloat16 shadow needs `compensation`, zeros to begin with, which takes up what rounding drops, or a `seed` for
    stochastic rounding, another one every step (ema_bf16.py). Random bits differ between implementations.

    Raises ValueError for lists of different lengths and for a wrong shape, dtype, device, stride or decay;
    RuntimeError when `impl` names an implementation that cannot serve these tensors.
    """
    one_of("impl", impl, IMPLS)
    _check(shadow, params, decay, publish, compensation, seed)
    on_cpu = all(s.device.type == "cpu" for s in shadow)
    if impl == "native" or (impl == "auto" and on_cpu and native.available()):
        if not on_cpu:
            raise RuntimeError("impl='native' serves tensors on the CPU only")
        native.require()
        rest = native.ema_update_(shadow, params, decay, publish, compensation, seed)
        if rest and impl == "native":
            raise RuntimeError("impl='native' serves float32 and bfloat16 tensors only")
        if rest:
            ema_update_ref_(
                [shadow[i] for i in rest], [params[i] for i in rest], decay,
                publish=None if publish is None else [publish[i] for i in rest],
                compensation=None if compensation is None else [compensation[i] for i in rest], seed=seed,
            )  # fmt: skip
        return
    on_cuda = bool(shadow) and all(s.device.type == "cuda" for s in shadow)
    if impl == "triton" or (impl == "auto" and on_cuda and _triton_serves(shadow, params, publish)):
        chosen = passes.choose("triton", torch.float32, shadow[0].device if shadow else torch.device("cpu"))
        if not _triton_serves(shadow, params, publish):
            raise RuntimeError(f"impl={chosen!r} serves float32, bfloat16 and float16 tensors on one device")
        from advgame_kernels import ema_triton

        step = _step(decay)
        device = shadow[0].device if shadow else torch.device("cpu")
        if not isinstance(step, Tensor):
            step = torch.full((), step, dtype=torch.float32, device=device)
        ema_triton.ema_update_(shadow, params, step.to(device).reshape(1), publish, compensation, seed)
        return
    ema_update_ref_(shadow, params, decay, publish=publish, compensation=compensation, seed=seed)


def _triton_serves(shadow: Sequence[Tensor], params: Sequence[Tensor], publish: Sequence[Tensor | None] | None) -> bool:
    """Whether the Triton kernel knows these dtypes and all tensors share a device."""
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    known = all(p.dtype in narrow for p in params) and all(x is None or x.dtype in narrow for x in publish or ())
    devices = {s.device for s in shadow}
    return known and len(devices) <= 1 and passes.triton_reason() is None
