"""A head whose vocabulary is split over the ranks of a process group, in equal shards by rank.

Every rank has the same hidden states and its own rows of the weight. A chunk's statistics are made per shard and
merged from one all-gather of three numbers a row: with w_r = exp(lse_r − lse), entropy = Σ w_r (H_r + lse −
lse_r), which needs no large differences. The gradient pass is then local; only dHidden is summed over the ranks,
once, at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from advgame_kernels._checks import refuse
from advgame_kernels.types import LogProbs


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of the vocabulary: ids [start, start + size) of ranks · size."""

    group: dist.ProcessGroup
    start: int
    size: int
    ranks: int

    def local_labels(self, labels: Tensor) -> Tensor:  # (n,) -> (n,)
        """Labels within the shard, −1 for those of other ranks."""
        local = labels - self.start
        return torch.where((local >= 0) & (local < self.size), local, -1)

    def merge(self, local: LogProbs, labels: Tensor) -> LogProbs:
        """Statistics over the whole vocabulary from each rank's, which were made with labels clamped to the shard.

        Raises ValueError (a device assertion on a GPU) where the shards are not equal.
        """
        part = torch.stack([local.lse, local.entropy.double(), local.logps.double()])
        part = torch.cat([part, part.new_full((3, 1), self.size)], dim=1)  # one column: everybody's share of the ids
        parts = part.new_empty((self.ranks, *part.shape))
        dist.all_gather(list(parts.unbind(0)), part, group=self.group)
        self._check_sizes(parts[:, 0, -1])
        shard_lse, shard_entropy, shard_logps = parts[..., :-1].unbind(dim=1)
        lse = torch.logsumexp(shard_lse, dim=0)
        share = torch.exp(shard_lse - lse)
        # A shard of −inf logits only has share 0 and an undefined entropy.
        terms = torch.where(share > 0, share * (shard_entropy + lse - shard_lse), 0.0)
        owner = (labels // self.size)[None]
        logps = (shard_logps.gather(0, owner) + (shard_lse.gather(0, owner) - lse))[0]
        return LogProbs(logps.to(local.logps.dtype), terms.sum(dim=0).to(local.entropy.dtype), lse)

    def _check_sizes(self, sizes: Tensor) -> None:  # (ranks,)
        same = (sizes == self.size).all()
        if sizes.is_cuda:
            torch._assert_async(same, "weight: expected as many vocabulary rows on every rank")
        elif not same:
            refuse("weight", "as many vocabulary rows on every rank", [int(n) for n in sizes])

    def sum_(self, grad: Tensor) -> None:
        """Add up a gradient over the ranks in place."""
        dist.all_reduce(grad, group=self.group)


def make_shard(weight: Tensor, group: dist.ProcessGroup | None) -> VocabShard | None:
    """The shard that `weight` (V / ranks, H) is in `group`; None without a group."""
    if group is None:
        return None
    size = weight.shape[0]
    return VocabShard(group, dist.get_rank(group) * size, size, dist.get_world_size(group))


def whole_vocabulary(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:  # (V / ranks, …) -> (V, …)
    """All shards in rank order, this rank's own still attached to its graph; `x` itself without a group."""
    if group is None:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    parts[dist.get_rank(group)] = x
    return torch.cat(parts)
