"""One player's publish as one pass: the average moves, its converted copy lands, staged copies follow.

On CUDA the pass is captured into a graph once and replayed each step; the decay lives on the device, so a schedule
needs no new capture. The graph holds addresses: before every pass all pointers, shapes, strides and dtypes and the
copy plan are compared with those it was made for, and any change makes a new one. On the CPU, and wherever something
cannot be captured, the same calls run as they are, with the same result to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from advgame_kernels import PreparedEma
from torch import Tensor

from advgame.publish.destinations import Destinations, Scatter

Fingerprint = tuple[object, ...]


def fingerprint(tensors: Iterable[Tensor], key: str = "") -> Fingerprint:
    """Equal for the same memory, read in the same way, under the same plan (`key`)."""
    return (key, *((t.data_ptr(), tuple(t.shape), t.stride(), t.dtype, t.device) for t in tensors))


class PublishPass:
    """`made(shadow, live, served, decay)` moves float32 averages towards `live` and fills `served`.

    capture: False never captures; else CUDA does, and what cannot be captured follows the replay. builds: how often the
    pass has been made anew.
    """

    def __init__(self, *, capture: bool = True) -> None:
        self.builds = 0
        self._capture = capture
        self._fingerprint: Fingerprint = ()
        self._ema: PreparedEma | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._after: list[tuple[Tensor, Tensor]] = []
        self._scatters: Sequence[Scatter] = ()
        self._inside = True

    @property
    def captured(self) -> bool:
        return self._graph is not None

    @torch.no_grad()
    def __call__(
        self, shadow: Mapping[str, Tensor], live: Mapping[str, Tensor], served: Mapping[str, Tensor], decay: float
    ) -> None:
        """All by parameter name. ValueError: shapes, dtypes or memory layouts that the update cannot take."""
        names = list(shadow)
        averages, players = [shadow[name] for name in names], [live[name].data for name in names]
        copies = [served[name] for name in names]
        made = served if isinstance(served, Destinations) else None
        scatters = () if made is None else made.scatters
        pieces = [t for one in scatters for t in (one.taken, one.into)]
        found = fingerprint((*averages, *players, *copies, *pieces), "" if made is None else made.key)
        if found != self._fingerprint:
            self._build(averages, players, copies, scatters)
            self._fingerprint = found
        assert self._ema is not None
        if self._graph is not None:
            self._ema.set(decay)
            self._graph.replay()
        else:
            self._ema(decay)
        if self._graph is None or not self._inside:
            self._follow()
        if made is not None:
            made.scattered = True

    def _build(
        self, averages: list[Tensor], players: list[Tensor], copies: list[Tensor], scatters: Sequence[Scatter]
    ) -> None:
        self._graph, self._ema, self._fingerprint = None, None, ()  # the old one's addresses may be gone
        # an engine whose weights go through host memory is written in a second pass
        near = all(out.device == own.device for out, own in zip(copies, averages, strict=True))
        self._ema = PreparedEma(averages, players, copies if near else None)
        self._after = [] if near else list(zip(copies, averages, strict=True))
        self._scatters = scatters
        self.builds += 1
        # a copy to another GPU waits for that GPU's own stream, which is not part of a capture
        self._inside = all(one.into.device == one.taken.device == self._ema.device for one in scatters)
        if self._ema.capturable and near and self._capture is not False:
            self._graph = self._captured(self._ema)

    def _follow(self) -> None:
        for out, own in self._after:
            out.copy_(own)
        for one in self._scatters:
            one.into.copy_(one.taken)

    def _captured(self, ema: PreparedEma) -> torch.cuda.CUDAGraph:
        """The graph. Before it, everything runs once at decay 1, which changes no average: kernels get compiled, which
        may not happen inside a capture."""

        def calls() -> None:
            ema.launch()
            if self._inside:
                self._follow()

        ema.set(1.0)
        stream = torch.cuda.Stream(ema.device)
        stream.wait_stream(torch.cuda.current_stream(ema.device))
        with torch.cuda.stream(stream):
            calls()
        torch.cuda.current_stream(ema.device).wait_stream(stream)
        torch.cuda.synchronize(ema.device)
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may sample on this GPU meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            calls()
        return graph
