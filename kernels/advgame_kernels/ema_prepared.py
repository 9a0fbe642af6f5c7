"""`ema_update_` of the same tensors step after step: checked once, one table of addresses, ready for a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from advgame_kernels import native
from advgame_kernels.ema import _check, _triton_serves, ema_update_, ema_update_ref_


class PreparedEma:
    """A float32 average over fixed tensors; `prepared(decay)` does what `ema_update_` does, to the last bit.

    The tensors must stay where they are: compare `data_ptr()` before a call if somebody else may move them. `step` is a
    (1,) float32 tensor, 1 − decay, that the CUDA kernel reads when it runs: a graph that captured `launch` follows a
    schedule without being captured again. Raises ValueError as `ema_update_` does.
    """

    def __init__(
        self,
        shadow: Sequence[Tensor],  # float32, contiguous, one device
        params: Sequence[Tensor],
        publish: Sequence[Tensor | None] | None = None,
    ):
        _check(shadow, params, 0.0, publish, None, None)
        self.shadow, self.params = list(shadow), [p.detach() for p in params]
        self.publish = None if publish is None else list(publish)
        self.device = shadow[0].device if shadow else torch.device("cpu")
        self.step = torch.zeros(1, dtype=torch.float32, device=self.device)
        self._launches = []
        self._table: native.EmaTable = []
        self._rest = list(range(len(self.shadow)))
        if self.device.type == "cuda" and _triton_serves(self.shadow, self.params, self.publish):
            from advgame_kernels import ema_triton

            for members in ema_triton.groups(self.params, self.publish):
                of_shadow, of_params = [self.shadow[i] for i in members], [self.params[i] for i in members]
                copies = ema_triton.copies_of(self.publish, members)
                self._launches.append(ema_triton.prepare(of_shadow, of_params, copies))
            self._rest = []
        elif self.device.type == "cpu" and native.available():
            self._table, self._rest = native.ema_table(self.shadow, self.params, self.publish)

    @property
    def capturable(self) -> bool:
        """Whether `launch` is nothing but kernels on the device."""
        return bool(self._launches)

    def __call__(self, decay: float) -> None:
        """One update; `publish` holds the new shadow afterwards."""
        if self._launches:
            self.set(decay)
            return self.launch()
        if self._table:
            native.ema_run(self._table, 1.0 - decay)
        if self._rest:
            rest = [None if self.publish is None else self.publish[i] for i in self._rest]
            shadow, params = [self.shadow[i] for i in self._rest], [self.params[i] for i in self._rest]
            whole = ema_update_ if self.device.type == "cuda" else ema_update_ref_
            whole(shadow, params, decay, publish=rest)
        return None

    def set(self, decay: float) -> None:
        """The decay of the coming launches."""
        self.step.fill_(1.0 - decay)

    def launch(self) -> None:
        """The kernels alone, at the decay that was set; CUDA with Triton only."""
        for one in self._launches:
            one.run(self.step)
