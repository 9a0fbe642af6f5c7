"""One player's publish as one pass: the average moves, its converted copy lands, staged copies follow, sums are taken.

On CUDA the pass is one graph, replayed each step: the average's kernel is captured, the copies are nodes of it, also
those to another GPU, and a second graph of the same pass ends with the checksums of the engine's memory, for the steps
that are checked. The decay lives on the device, so a schedule needs no new capture. The graph holds addresses: before
every pass all pointers, shapes, strides and dtypes and the copy plan are compared with those it was made for, and any
change makes a new one. On the CPU, and wherever something cannot be captured, the same calls run as they are, with the
same result to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from advgame_kernels import PreparedEma
from torch import Tensor

from advgame.publish import host
from advgame.publish.copies import Fingerprint, fingerprint
from advgame.publish.destinations import Destinations


class PublishPass:
    """`made(shadow, live, served, decay)` moves float32 averages towards `live` and fills `served`.

    capture: False never captures; else CUDA does, and what cannot be captured follows the replay. builds: how often the
    pass has been made anew.
    """

    def __init__(self, *, capture: bool = True) -> None:
        self.builds = 0
        self._capture = capture
        self._fingerprint: Fingerprint = ()
        self._made: Destinations | None = None
        self._ema: PreparedEma | None = None
        self._captured: torch.cuda.CUDAGraph | None = None
        self._after: list[tuple[Tensor, Tensor]] = []
        self._graphs: dict[bool, CapturedPass] = {}

    @property
    def captured(self) -> bool:
        return self._captured is not None

    @torch.no_grad()
    def __call__(
        self, shadow: Mapping[str, Tensor], live: Mapping[str, Tensor], served: Mapping[str, Tensor], decay: float
    ) -> None:
        """All by parameter name. ValueError: shapes, dtypes or memory layouts that the update cannot take."""
        names = list(shadow)
        averages, players = [shadow[name] for name in names], [live[name].data for name in names]
        copies = [served[name] for name in names]
        made = served if isinstance(served, Destinations) else None
        pieces = () if made is None else [t for pair in made.copies.pairs for t in pair]
        found = fingerprint((*averages, *players, *copies, *pieces), "" if made is None else made.key)
        if found != self._fingerprint or made is not self._made:
            self._build(averages, players, copies, made)
            self._fingerprint = found
        assert self._ema is not None
        if self._captured is None:
            self._ema(decay)
            self._follow(made)
            return
        self._ema.set(decay)
        if made is None:
            self._captured.replay()
        else:
            self._graph(made).replay(made)

    def _build(
        self, averages: list[Tensor], players: list[Tensor], copies: list[Tensor], made: Destinations | None
    ) -> None:
        # the old one's addresses may be gone
        self._graphs, self._captured, self._ema, self._fingerprint = {}, None, None, ()
        if made is not None and made is self._made:
            made.renew()
        self._made = made
        # an engine whose weights go through host memory is written in a second pass
        near = all(out.device == own.device for out, own in zip(copies, averages, strict=True))
        self._ema = PreparedEma(averages, players, copies if near else None)
        self._after = [] if near else list(zip(copies, averages, strict=True))
        self.builds += 1
        if self._ema.capturable and near and self._capture is not False:
            self._ema.set(1.0)  # what runs before a capture changes no average
            self._captured = captured(self._ema.launch, self._ema.device)

    def _follow(self, made: Destinations | None) -> None:
        for out, own in self._after:
            out.copy_(own)
        if made is not None:
            made.scatter()
            if made.verify:
                made.sum_up()

    def _graph(self, made: Destinations) -> CapturedPass:
        if made.verify not in self._graphs:
            assert self._captured is not None
            assert self._ema is not None
            self._graphs[made.verify] = CapturedPass(self._captured, made, self._ema.device, verify=made.verify)
        return self._graphs[made.verify]


class CapturedPass:
    """A captured average, the copies that follow it and, with `verify`, the sums of all parts, as one CUDA graph.

    What torch has to copy itself cannot be part of it; then it follows, and the sums after it.
    """

    def __init__(self, average: torch.cuda.CUDAGraph, made: Destinations, device: torch.device, *, verify: bool):
        self._device = device
        self._inside = not made.copies.rest
        self._summed = verify and self._inside and all(sums.device == device for sums in made.sums)
        self._graph = host.require("ipc").PublishGraph(host.cuda(), device.index)
        self._graph.then_graph(average.raw_cuda_graph())
        if made.copies.rows is not None:
            self._graph.then_copies(made.copies.rows)
        self._parts = [average]  # they own memory that the graph uses
        for sums in made.sums if self._summed else ():
            self._parts.append(captured(sums.launch, device))
            self._graph.then_graph(self._parts[-1].raw_cuda_graph())

    def replay(self, made: Destinations) -> None:
        self._graph.launch(torch.cuda.current_stream(self._device).cuda_stream)
        for into, taken in made.copies.rest:
            into.copy_(taken)
        made.scattered, made.summed = True, self._summed
        if made.verify and not self._summed:
            made.sum_up()


def captured(calls: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """The graph of `calls`, kept so that it can become a part of another. They run once before: kernels get compiled
    then, which may not happen inside a capture."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        calls()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    # thread_local: another thread may sample on this GPU meanwhile
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        calls()
    return graph
