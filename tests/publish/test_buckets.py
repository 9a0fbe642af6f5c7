"""Packed buckets and the group of a collective publish: layout, copies, two real processes over gloo, taken ports."""

import socket
import subprocess
import sys
import time
from itertools import pairwise

import pytest
import torch
from test_plan import SOURCES, Fused, plan_of

from advgame.errors import InputError
from advgame.publish import group as groups
from advgame.publish.binding import copied_checksums, flats_of
from advgame.publish.buckets import Layout, Unpacker, layout_of


@pytest.mark.parametrize("bucket", [1, 300, 1 << 20])
def test_a_source_lies_whole_in_one_bucket(bucket):
    layout = layout_of([plan_of()], bucket)
    assert Layout.from_tree(layout.to_tree()) == layout
    assert [p.name for p in layout.packed] == [s.name for s in SOURCES]
    ends = {p.name: p.offset + p.bytes for p in layout.packed}
    for begin, end in pairwise(layout.bounds):
        inside = [p for p in layout.packed if begin <= p.offset < end]
        assert inside
        assert all(ends[p.name] <= end for p in inside)
        assert end - begin <= bucket + 255 or len(inside) == 1  # storages begin on multiples of 256
    assert len(layout.bounds) - 1 == {1: 6, 300: 5, 1 << 20: 1}[bucket]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("bucket", [1, 1 << 20])
def test_unpacked_buckets_are_what_the_loader_would_have_loaded(world, bucket):
    tensors = {s.name: torch.randn(s.shape) for s in SOURCES}
    plans = [plan_of(rank, world) for rank in range(world)]
    layout = layout_of(plans, bucket)
    wire = torch.zeros(layout.bounds[-1], dtype=torch.uint8)
    for one in layout.packed:
        one.of(wire).view(one.shape).copy_(tensors[one.name])
    for rank, plan in enumerate(plans):
        model, loaded = Fused(rank, world), Fused(rank, world)
        loaded.load_weights(tensors.items())
        unpacker = Unpacker(layout, plan, flats_of(model, plan), torch.device("cpu"))
        with torch.no_grad():
            for number, (begin, end) in enumerate(pairwise(layout.bounds)):
                unpacker.bucket(number).copy_(wire[begin:end])
                unpacker.unpack(number)
        for mine, theirs in zip(model.parameters(), loaded.parameters(), strict=True):
            assert torch.equal(mine, theirs)
        assert copied_checksums(plan, flats_of(model, plan)) == copied_checksums(plan, flats_of(loaded, plan))


MEMBER = """
import sys, torch
from advgame.publish import group as groups
limit = groups.timedelta(seconds=20)
store = groups.dist.TCPStore("127.0.0.1", int(sys.argv[1]), None, False, limit, wait_for_workers=False)
cpu = torch.device("cpu")
member = groups.join(store, "g", 1, 2, device=cpu, host="127.0.0.1", seconds=20)
data = torch.zeros(1 << 20, dtype=torch.uint8)
groups.broadcast(member, data, 20)
assert data.eq(torch.arange(1 << 20) % 251).all()
"""


def test_a_broadcast_to_another_process_and_its_death():
    store = groups.open_store("127.0.0.1", 0)
    child = subprocess.Popen([sys.executable, "-c", MEMBER, str(store.port)], stderr=subprocess.PIPE, text=True)
    cpu = torch.device("cpu")
    mine = groups.join(store, "g", 0, 2, device=cpu, host="127.0.0.1", seconds=20)
    data = (torch.arange(1 << 20) % 251).to(torch.uint8)
    groups.broadcast(mine, data, 20)
    _, err = child.communicate(timeout=20)
    assert child.returncode == 0, err
    # the other side is gone: an error at once, not a hang
    start = time.perf_counter()
    with pytest.raises(RuntimeError):
        groups.broadcast(mine, torch.zeros(1 << 24, dtype=torch.uint8), 20)
    assert time.perf_counter() - start < 10
    groups.leave(mine)


def test_a_member_that_never_comes_is_not_waited_for_for_ever():
    store = groups.open_store("127.0.0.1", 0)
    start = time.perf_counter()
    with pytest.raises(RuntimeError):
        groups.join(store, "nobody", 0, 2, device=torch.device("cpu"), host="127.0.0.1", seconds=1.0)
    assert time.perf_counter() - start < 15


def test_a_taken_port_is_one_clear_line():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=rf"rollout\.vllm\.rendezvous_port: port {port} is taken; give a free one"):
            groups.open_store("127.0.0.1", port)
