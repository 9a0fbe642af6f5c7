"""Checksums of many tensors in one launch, without the tensors leaving their device.

Of each tensor's bytes, in the order of its elements: Σ byte(i) · (2 · w(i) + 1) modulo 2^64, w(i) the upper half of
2654435761 · i modulo 2^32. Every weight is odd, so that a change of one byte always shows. The factor is 2^32 over the
golden ratio: neighbours get far weights, and so do places that lie a power of two apart, as rows and heads do. Weights
repeat after 4 GiB. Floor: one read of every byte.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from advgame_kernels import native, passes
from advgame_kernels._checks import one_of, refuse
from advgame_kernels.passes import IMPLS

FACTOR = 2654435761
_PART = 1 << 24


def byte_sums_ref(tensors: Sequence[Tensor], *, impl: str = "auto") -> Tensor:
    """The same as `byte_sums`, in plain torch."""
    sums = torch.zeros(len(tensors), dtype=torch.int64, device=_check(tensors))
    for number, tensor in enumerate(tensors):
        data = tensor.detach().flatten().view(torch.uint8)
        for start in range(0, data.numel(), _PART):
            part = data[start : start + _PART].to(torch.int64)
            places = torch.arange(start, start + part.numel(), device=part.device)
            sums[number] += (part * (((places * FACTOR & 0xFFFFFFFF) >> 16) * 2 + 1)).sum()
    return sums


def _check(tensors: Sequence[Tensor]) -> torch.device:
    """Their device."""
    for i, t in enumerate(tensors):
        if not t.is_contiguous() or t.device != tensors[0].device:
            refuse(f"tensors[{i}]", f"a contiguous tensor on {tensors[0].device}", f"{t.device}, stride {t.stride()}")
    return tensors[0].device if tensors else torch.device("cpu")


class PreparedSums:
    """`byte_sums` of the same tensors time after time: checked once, one table of addresses, ready for a CUDA graph.

    The tensors must stay where they are. `launch` fills `out`, (n,) int64 on their device, and begins from zero each
    time. Raises ValueError and RuntimeError as `byte_sums` does.
    """

    def __init__(self, tensors: Sequence[Tensor], *, impl: str = "auto"):
        one_of("impl", impl, IMPLS)
        self.tensors = list(tensors)
        self.device = _check(tensors)
        self.out = torch.zeros(len(tensors), dtype=torch.int64, device=self.device)
        on_cpu = self.device.type == "cpu"
        self._native = impl == "native" or (impl == "auto" and on_cpu and native.available())
        self._launch = None
        if self._native:
            if not on_cpu:
                raise RuntimeError("impl='native' serves tensors on the CPU only")
            native.require()
        elif impl == "triton" or (impl == "auto" and not on_cpu and passes.triton_reason() is None):
            passes.choose("triton", torch.float32, self.device)
            from advgame_kernels import sums_triton

            self._launch = sums_triton.prepare(self.tensors, self.out)

    @property
    def capturable(self) -> bool:
        """Whether `launch` is nothing but work on the device."""
        return self._launch is not None and self.device.type == "cuda"

    def launch(self) -> None:
        """Fills `out`."""
        if self._launch is not None:
            self._launch.run()
        elif self._native:
            native.byte_sums(self.tensors, self.out)
        else:
            self.out.copy_(byte_sums_ref(self.tensors))


def byte_sums(tensors: Sequence[Tensor], *, impl: str = "auto") -> Tensor:
    """A checksum of each tensor's bytes (formula above), (n,) int64 on their device: 64 bits, the top one as a sign.

    tensors: contiguous, any dtypes and sizes, on one device. Every implementation gives the same. Raises ValueError for
    a tensor with gaps or on another device; RuntimeError when `impl` cannot serve.
    """
    made = PreparedSums(tensors, impl=impl)
    made.launch()
    return made.out
