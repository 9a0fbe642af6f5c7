"""Shards sent piece by piece over gloo: uneven, absent, of one rank; into fused, sliced, padded and tied places."""

import subprocess
import sys
import threading
import time
from math import prod

import pytest
import torch
import torch.distributed as dist
from test_plan import SOURCES, Fused

from advgame.publish import group as groups
from advgame.publish.binding import compare, copied_checksums, flats_of
from advgame.publish.buckets import Unpacker, layout_of
from advgame.publish.pieces import PieceReceiver, PieceSender, digest, messages_of
from advgame.publish.record import record

CPU = torch.device("cpu")
SECONDS = 20.0
SIZES = {source.name: prod(source.shape) for source in SOURCES}


def rows(ranks):
    """Every source cut into equal shares, the last one smaller or empty: ZeRO 3."""
    held = []
    for rank in range(ranks):
        share = {name: -(-size // ranks) for name, size in SIZES.items()}
        starts = {name: min(rank * share[name], size) for name, size in SIZES.items()}
        held.append({name: (starts[name], min(share[name], SIZES[name] - starts[name])) for name in SIZES})
    return held


def run_of_all(ranks):
    """All sources behind one another, cut into equal shares: ZeRO 1 and 2. Odd places, and ranks without a source."""
    total, held = sum(SIZES.values()), []
    for rank in range(ranks):
        begin, end, at, own = total * rank // ranks, total * (rank + 1) // ranks, 0, {}
        for name, size in SIZES.items():
            first, last = max(begin, at), min(end, at + size)
            own[name] = (first - at, last - first) if last > first else (0, 0)
            at += size
        held.append(own)
    return held


def nothing_for_one(ranks):
    """The second rank holds nothing at all."""
    empty = dict.fromkeys(SIZES, (0, 0))
    return [run_of_all(max(1, ranks - 1))[0], empty, *run_of_all(max(1, ranks - 1))[1:]]


class Sent:
    """One publish from ranks that hold `held` to an engine of `world` workers."""

    def __init__(self, held, world, *, dtype=torch.float32, bucket=300, limit=64):
        self.tensors = {source.name: torch.randn(source.shape) for source in SOURCES}
        self.models = [Fused(rank, world).to(dtype) for rank in range(world)]
        self.plans = [
            record(model, SOURCES, name="fused", dtype=dtype, rank=rank, world_size=world)
            for rank, model in enumerate(self.models)
        ]
        self.layout = layout_of(self.plans, bucket)
        self.messages = messages_of(self.layout, held, limit)
        self.held, self.world, self.dtype = held, world, dtype

    def go(self, verify=True, tensors=None, spoil=lambda receiver: None):
        """(checksums by sender, checksums by worker); an error of a worker is raised."""
        tensors = self.tensors if tensors is None else tensors
        store, errors, senders = dist.HashStore(), [], []
        sums, found = [None] * len(self.held), [None] * self.world

        def member(sender, rank):
            size = 1 + self.world
            return groups.join(
                dist.PrefixStore(f"{sender}", store), "g", rank, size, device=CPU, host="127.0.0.1", seconds=SECONDS
            )

        def send(number):
            spans = self.held[number]
            own = [message for message in self.messages if message.sender == number]
            pieces = {name: tensors[name].flatten()[spans[name][0] : sum(spans[name])] for name in SIZES}
            sender = PieceSender(self.layout, own, spans, member(number, 0), CPU, lambda: False)
            senders.append(sender)  # one with nothing to send must not hang up while the workers still connect to it
            sums[number] = sender.send(pieces, SECONDS, verify=verify)

        def receive(rank):
            model, plan = self.models[rank], self.plans[rank]
            unpacker = Unpacker(self.layout, plan, flats_of(model, plan), CPU)
            members = [member(number, 1 + rank) for number in range(len(self.held))]
            receiver = PieceReceiver(unpacker, self.messages, members)
            spoil(receiver)
            found[rank] = receiver.receive(SECONDS, verify=verify)

        def kept(call, number):
            try:
                call(number)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=kept, args=(send, number)) for number in range(len(self.held))]
        threads += [threading.Thread(target=kept, args=(receive, rank)) for rank in range(self.world)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        if errors:
            raise errors[0]
        return sums, found

    def assert_loaded(self):
        """Bit for bit what the loader would have made of the whole tensors."""
        for rank, (model, plan) in enumerate(zip(self.models, self.plans, strict=True)):
            loaded = Fused(rank, self.world).to(self.dtype)
            loaded.load_weights([(name, tensor.to(self.dtype)) for name, tensor in self.tensors.items()])
            assert copied_checksums(plan, flats_of(model, plan)) == copied_checksums(plan, flats_of(loaded, plan))
            for mine, theirs in zip(model.parameters(), loaded.parameters(), strict=True):
                assert torch.equal(mine, theirs)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "held", [rows(1), rows(2), rows(5), run_of_all(2), run_of_all(3), nothing_for_one(3)],
    ids=["one rank", "rows of 2", "rows of 5", "runs of 2", "runs of 3", "one has nothing"],
)  # fmt: skip
def test_pieces_are_what_the_loader_would_have_loaded(held, world, dtype):
    sent = Sent(held, world, dtype=dtype)
    sums, found = sent.go()
    sent.assert_loaded()
    merged = {name: value for own in sums for name, value in own.items()}
    assert merged
    for one in found:
        compare(merged, one)
        assert merged == one
    assert {m.sender for m in sent.messages} == {i for i, own in enumerate(held) if any(n for _, n in own.values())}


@pytest.mark.parametrize(("bucket", "limit"), [(1, 16), (1, 1 << 20), (300, 100), (1 << 20, 1 << 20)])
def test_messages_are_bounded_and_send_every_element_once(bucket, limit):
    sent = Sent(run_of_all(3), 2, bucket=bucket, limit=limit)
    assert all(message.bytes <= limit for message in sent.messages)
    runs = sorted((run.source, run.start, run.length) for message in sent.messages for run in message.runs)
    for name, size in SIZES.items():
        own = [(start, length) for source, start, length in runs if source == name]
        assert [0, *(start + length for start, length in own)] == [*(start for start, _ in own), size]
    order = [(message.bucket, message.sender) for message in sent.messages]
    assert order == sorted(order)
    if limit == 1 << 20:
        assert len(order) == len(set(order)), "one message for each bucket and rank"
    assert sent.go(verify=False) == ([{}] * 3, [{}] * 2)
    sent.assert_loaded()


def test_both_sides_cut_alike_or_know_it():
    layout = Sent(rows(2), 1).layout
    one, other = messages_of(layout, rows(2), 64), messages_of(layout, run_of_all(2), 64)
    assert digest(one) == digest(messages_of(layout, rows(2), 64))
    assert len({digest(one), digest(other), digest(messages_of(layout, rows(2), 32))}) == 3


@pytest.mark.parametrize("change", [(0, 23), (0, 0), (1, 23)], ids=str)
def test_shards_that_are_not_the_whole_once_are_refused(change):
    layout, held = Sent(rows(1), 1).layout, rows(2)
    held[0]["q"] = change  # of 24 elements, of which the second rank has the last 12
    with pytest.raises(ValueError, match="the ranks' shards are not all of q once"):
        messages_of(layout, held, 64)


def test_a_changed_bit_and_a_wrong_place_are_named():
    sent = Sent(run_of_all(2), 1)
    (first, second), _ = sent.go()
    changed = {name: tensor.clone() for name, tensor in sent.tensors.items()}
    changed["v"].view(torch.int32)[1, 2] ^= 1
    (other, same), found = sent.go(tensors=changed)
    assert same == second or other == first
    with pytest.raises(RuntimeError, match=r"1 of \d+ places differ from what was written, first v\["):
        compare(first | second, found[0])

    def spoil(receiver):
        unpack = receiver._unpacker.unpack

        def wrong(number):
            unpack(number)
            receiver._unpacker.flats["norm"][1] += 1

        receiver._unpacker.unpack = wrong

    with pytest.raises(RuntimeError, match=r"1 of 6 places differ from what was written, first 5: norm -> norm"):
        sent.go(spoil=spoil)


def test_a_meeting_to_which_nobody_comes_ends_when_it_is_called_off():
    store = groups.open_store("127.0.0.1", 0)
    over = groups.whether("127.0.0.1", store.port, "nobody comes", SECONDS)

    def join():
        own = groups.reach("127.0.0.1", store.port, SECONDS)
        return groups.join(own, "alone", 0, 2, device=CPU, host="127.0.0.1", seconds=2.0)

    start = time.perf_counter()
    threading.Timer(0.3, lambda: store.set("nobody comes", "")).start()
    with pytest.raises(RuntimeError, match="called off"):
        groups.limited(join, SECONDS, over)
    assert time.perf_counter() - start < 1.5
    with pytest.raises(RuntimeError, match=r"nobody came within 0\.1 s"):
        groups.limited(lambda: time.sleep(1), 0.1, lambda: False)
    assert groups.limited(lambda: 3, SECONDS, lambda: False) == 3


def test_a_sender_whose_workers_are_silent_leaves_when_it_is_told():
    store = groups.open_store("127.0.0.1", 0)
    made = {}

    def join(rank):
        own = groups.reach("127.0.0.1", store.port, SECONDS)
        made[rank] = groups.join(own, "silent", rank, 2, device=CPU, host="127.0.0.1", seconds=SECONDS)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    over = groups.whether("127.0.0.1", store.port, "over", SECONDS)
    threading.Timer(0.3, lambda: store.set("over", "")).start()
    data, start = torch.zeros(1000, dtype=torch.uint8), time.perf_counter()
    with pytest.raises(RuntimeError, match="called off"):
        groups.broadcast(made[0], data, SECONDS, over)
    assert 0.2 < time.perf_counter() - start < 2
    made.clear()  # as when the other side dies: what hung ends at once


def test_a_process_that_gave_a_call_up_ends_as_it_should():
    """The call wakes while the interpreter shuts down, since the store ends with it."""
    code = """
from datetime import timedelta
import torch.distributed as dist
from advgame.publish import group
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
client = dist.TCPStore("127.0.0.1", store.port, timeout=timedelta(seconds=0.6), wait_for_workers=False)
try:
    group.limited(lambda: client.get("nothing"), 5.0, lambda: True)
except RuntimeError as error:
    print(error)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "called off\n"), ended.stderr
