"""Two ranks, each with data of its own, make the update that one makes on all of it: uneven shares, and none at all."""

from __future__ import annotations

import json
import os
import socket

import models
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_learner import groups, learner, pairs

from advgame.game.pairs import Group, Member
from advgame.learn.ranks import Ranks, filled

SHARES = {"uneven": (3, 1), "one has none": (4, 0)}
"""How many of four pairs or groups each rank has."""
SETTINGS = {
    "dpo": {"reference": "recompute"},
    "ipo": {"objective": "ipo", "reference": "auto"},
    "grpo": {"objective": "grpo"},
    "grpo by token": {"objective": "grpo", "aggregate": "token"},
    "reinforce": {"objective": "reinforce"},
}


def update(made, data):
    """Metrics of an update, and the weights after it."""
    preferences = made.settings.objective in ("dpo", "ipo")
    values = made.update_pairs(data, 0.0) if preferences else made.update_groups(data, 0.0)
    return values, {name: p.detach().clone() for name, p in made.parameters.items()}


def data_of(objective):
    if objective in ("dpo", "ipo"):
        return pairs(4)
    first, second = groups()
    longer = Group(tuple(Member(m.sample, m.reward + 1, -m.advantage, m.weight) for m in first.members))
    return [first, second, longer, Group(second.members[:1])]


def optimised(folder, settings, ranks=None):
    made = learner(folder, micro_tokens=12, **settings)
    made.ranks = ranks or Ranks()
    return made


def worker(rank, port, folder):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    ranks = Ranks(dist.group.WORLD)
    assert [kind for _, kind in filled("ab"[rank:], "", ranks)] == ([True, True], [True, False])[rank]
    for name, settings in SETTINGS.items():
        data = data_of(settings.get("objective", "dpo"))
        wanted, whole = update(optimised(folder, settings), data)
        for share, counts in SHARES.items():
            own = data[: counts[0]] if rank == 0 else data[counts[0] :]
            made = optimised(folder, settings, ranks)
            values, weights = update(made, own)
            where = f"{name}, {share}"
            for key, weight in whole.items():
                torch.testing.assert_close(weights[key], weight, atol=1e-5, rtol=1e-5, msg=f"{where}: {key}")
            assert values.keys() == wanted.keys(), where
            for key in values.keys() - {"tokens", "tokens_saved", "reference_change"}:
                assert values[key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-5), f"{where}: {key}"
            states = ranks.gather(json.dumps(made.reference.state()))
            assert len(set(states)) == 1, where
        idle = optimised(folder, settings, ranks)
        values, weights = update(idle, [])
        assert idle.updates == 0
        assert not any(values.values())
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_make_one_update(tmp_path):
    folder = models.folder(tmp_path / "player")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, folder), nprocs=2)


def test_one_rank_sends_nothing():
    alone = Ranks()
    assert (alone.size, alone.sum(3), alone.gather("x")) == (1, 3, ["x"])
    assert list(filled([1, 2], 0, alone)) == [(1, True), (2, True)]
    values = torch.randn(50)
    mean, deviation = alone.moments(values)
    torch.testing.assert_close(torch.stack([mean, deviation]), torch.stack([values.mean(), values.std(correction=0)]))
