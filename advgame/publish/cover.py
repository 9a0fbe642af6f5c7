"""Whether strided boxes cover a stretch of elements, and how often."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from advgame.publish.plan import Region


def cover(regions: Iterable[Region], total: int) -> tuple[int, int]:
    """(elements of [0, total) in no region, elements held beyond the first time). All regions lie inside."""
    starts, ends = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for region in regions:
        first, length = _runs(region)
        starts.append(first)
        ends.append(first + length)
    start, end = np.concatenate(starts), np.concatenate(ends)
    order = np.argsort(start, kind="stable")
    start, end = start[order], end[order]
    reached = np.concatenate([[0], np.maximum.accumulate(end)[:-1]]) if len(end) else end
    held = int(np.maximum(0, end - np.maximum(start, reached)).sum())
    return total - held, int((end - start).sum()) - held


def _runs(region: Region) -> tuple[np.ndarray, int]:
    """First elements and the common length of the runs of neighbours that a box consists of."""
    length = 1
    sides = sorted(((s, n) for n, s in zip(region.shape, region.stride, strict=True) if n != 1), reverse=True)
    while sides and sides[-1][0] == length:
        length *= sides.pop()[1]
    starts = np.array([region.offset], np.int64)
    for stride, count in sides:
        starts = (starts[:, None] + stride * np.arange(count, dtype=np.int64)).ravel()
    return starts, length
