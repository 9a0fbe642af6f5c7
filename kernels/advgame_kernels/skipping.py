"""Leaves vocabulary blocks out of the gradient GEMMs where every gradient in them is negligible. Off by default.

A block of WIDTH columns is dropped from a chunk when |dlogit| ≤ skip_below · |factor of its row| in every row,
the factor being the gradient of the row's log-prob: so each dropped entry is at most `skip_below` times the pull
on the row's own label. At 2^-9 that is half an ulp of bfloat16 beside it. The bound is on single entries; their
sum over a dropped row part may be larger, which is why nobody gets this without asking. The weighted gradient
decides, not the probability: a token that nobody pulls on drops out whatever its distribution, and one that is
pulled on hard keeps its tail. Costs one more read of the chunk and a host sync; pays only where most of the
vocabulary is never likely anywhere in a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH = 512


def kept_runs(
    dlogits: Tensor,  # (n, V)
    d_logps: Tensor,  # (n,) gradient of each row's log-prob
    skip_below: float,
) -> list[slice]:
    """Maximal runs of columns that must not be dropped, in order."""
    vocab = dlogits.shape[1]
    scale = d_logps.abs().to(torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
    columns = torch.empty(vocab, dtype=torch.float32, device=dlogits.device)
    for start in range(0, vocab, 16 * WIDTH):  # a slice at a time: the chunk is never copied whole
        part = dlogits[:, start : start + 16 * WIDTH].abs().to(torch.float32)
        columns[start : start + 16 * WIDTH] = (part / scale[:, None]).amax(dim=0)
    padded = torch.nn.functional.pad(columns, (0, -vocab % WIDTH))
    keep = (padded.view(-1, WIDTH).amax(dim=1) > skip_below).tolist()
    runs: list[slice] = []
    for i, kept in enumerate(keep):
        if not kept:
            continue
        start, stop = i * WIDTH, min((i + 1) * WIDTH, vocab)
        if runs and runs[-1].stop == start:
            runs[-1] = slice(runs[-1].start, stop)
        else:
            runs.append(slice(start, stop))
    return runs
