"""Ranks that publish a sharded player straight to engines: bit for bit, on two and three ranks, and past a death."""

import json

import engines
import models
import pytest
from test_deepspeed import ROOT, needs_deepspeed, torchrun

RANKS = ROOT / "tests" / "learn" / "shard_ranks.py"
pytestmark = [pytest.mark.slow, needs_deepspeed]


def found(tmp_path, kind, player, ranks, attacker_ranks=0):
    out = tmp_path / "found.json"
    torchrun(ranks, RANKS, kind, player, out, attacker_ranks, timeout=560)
    return json.loads(out.read_text())


@pytest.mark.parametrize(("ranks", "attacker_ranks"), [(2, 0), (3, 1)])
def test_every_rank_sends_its_own_shard(tmp_path, ranks, attacker_ranks):
    """At every stage, whole and sliced workers, two types; rank 0 a member, and not. One engine dies meanwhile."""
    pytest.importorskip("vllm")  # workers' base classes
    results = found(tmp_path, "fake", models.folder(tmp_path / "m"), ranks, attacker_ranks)
    died, left, other, again = (results.pop(name) for name in ("died", "left", "other", "again"))
    assert len(results) == 5
    for case, one in results.items():
        assert one["equal"], case
        assert one["senders"] == (1 if case == "stage 0" else 2)
        assert ("2 ranks send their own shards" in one["notes"]) == (case != "stage 0")
    assert died[0] == "EngineDied"
    assert died[2] < 3
    assert left[0] == "RuntimeError"
    assert "it has left the engine's group" in left[1]
    assert other["equal"]
    assert other["seconds"] < 3
    assert again["equal"]


def test_ranks_publish_to_live_engines_and_outlive_them(tmp_path):
    """ZeRO 2 into one engine, ZeRO 3 into two: greedy tokens of the averaged weights; engines killed in a publish."""
    pytest.importorskip("vllm")
    results = found(tmp_path, "live", engines.folder(tmp_path / "m", seed=0), 2)
    one, two = results["one engine"], results["replicas"]
    assert all(one["found"]), one["found"]
    assert all(two["found"]), two["found"]
    (kind, _, _), known = two["died"]
    assert kind == "PublishFailed"
    assert 0 < known < 5
    assert two["learns"] < 5
    assert two["counters"]["defender_restarts"] == two["counters"]["defender_publish_failures"] == 1
