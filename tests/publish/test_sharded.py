"""How rank 0 leads a publish from many ranks: who is told what, and what each failure becomes; no weights move."""

import asyncio
import threading
from dataclasses import replace
from math import prod

import pytest
from test_plan import SOURCES, plan_of

from advgame.errors import InputError
from advgame.publish import group as groups
from advgame.publish.sharded import Sent, ShardsChannel
from advgame.rollout.channel import WriteFailed
from advgame.rollout.engine import EngineDied
from advgame.rollout.settings import VllmSettings

WHOLE = {source.name: (0, prod(source.shape)) for source in SOURCES}
NOTHING = dict.fromkeys(WHOLE, (0, 0))


class Workers:
    """An engine's side of the calls."""

    def __init__(self, plan=None):
        self.plan, self.device, self.sums, self.fails = plan or plan_of(), "gpu b", {"q[0:24]": 1}, None
        self.called, self.hangs = [], False

    async def collective_rpc(self, method, args=()):
        self.called.append((method, args))
        if method == "advgame_plan":
            return [{"plan": self.plan.to_tree()}]
        if method == "advgame_device":
            return [self.device]
        if method == "advgame_receive_ranks":
            if self.hangs:
                await asyncio.Event().wait()
            if self.fails is not None:
                raise self.fails
            return [self.sums]
        return [None]


class Ranks:
    """The team's side; `free` when the ranks can be told anything."""

    def __init__(self, *held, devices=("gpu a", "gpu c")):
        self.held, self.devices, self.sending = held or (WHOLE, NOTHING), devices, threading.Lock()
        self.answer, self.raises, self.calls = {"errors": [None, None], "sums": {"q[0:24]": 1}}, None, []
        self.free = threading.Event()
        self.free.set()

    def tell(self, call, told, **details):
        self.free.wait(10)
        if self.raises is not None:
            raise self.raises
        told()
        self.calls.append((call, details))
        return self.answer


def opened(ranks, workers=None):
    made = ShardsChannel("fused", SOURCES, ranks, VllmSettings(publish_timeout_s=5.0, start_timeout_s=5.0), "0")
    made.prepare()
    asyncio.run(made.attach(workers or Workers()))
    return made


def key_set(channel, key):
    return groups.open_store("127.0.0.1", 0).check([key.format(channel._name)])


def test_ranks_and_workers_are_told_the_same():
    ranks, workers = Ranks(), Workers()
    channel = opened(ranks, workers)
    assert channel.notes == ("2 ranks send their own shards",)
    (call, told), (method, (how, layout, held)) = ranks.calls[0], workers.called[-1]
    assert (call, method) == ("join", "advgame_join_ranks")
    assert told["how"] == how
    assert told["layout"] == layout
    names = [one["name"] for one in layout["packed"]]
    assert [dict(zip(names, map(tuple, own), strict=True)) for own in held] == [WHOLE, NOTHING]
    assert how["size"] == 2
    assert how["plans"] == [workers.plan.hash]
    channel.destinations.what = "shadow"
    asyncio.run(channel.deliver(workers, verify=True))
    (call, told), (method, (begin, patience, seconds, verify)) = ranks.calls[1], workers.called[-1]
    assert (call, told["what"], told["key"]) == ("send", "shadow", "0")
    assert (told["seconds"], told["verify"]) == (seconds, verify)
    assert (method, patience) == ("advgame_receive_ranks", 5.0)
    assert begin != how["begin"]
    assert not key_set(channel, "{}/over")
    assert not key_set(channel, begin), "keys do not pile up"
    assert isinstance(channel.destinations, Sent)
    assert not channel.destinations


def test_a_gpu_on_both_sides_is_one_clear_line():
    workers = Workers()
    workers.device = "gpu c"
    with pytest.raises(InputError, match=r"rollout\.vllm\.transport: collective needs trainer and engine on different"):
        opened(Ranks(), workers)
    workers.device = "cpu"
    opened(Ranks(devices=("cpu", "cpu")), workers)
    with pytest.raises(InputError, match=r"the ranks compute on GPUs, this engine on CPUs$"):
        opened(Ranks(), workers)


def test_shards_that_are_not_the_whole_and_another_plan_are_refused():
    with pytest.raises(RuntimeError, match="the ranks' shards are not all of q once"):
        opened(Ranks(NOTHING))
    channel = opened(Ranks())
    with pytest.raises(RuntimeError, match="the restarted engine lays its weights out differently"):
        asyncio.run(channel.attach(Workers(replace(plan_of(), model="another"))))


def test_what_a_rank_could_not_send_is_named_and_the_workers_are_not_waited_for():
    ranks, workers = Ranks(), Workers()
    channel = opened(ranks, workers)
    ranks.answer, workers.hangs = {"errors": [None, "rank 1 could not send its shard: no memory"], "sums": {}}, True
    with pytest.raises(RuntimeError, match="rank 1 could not send its shard: no memory"):
        asyncio.run(channel.deliver(workers, verify=False))
    assert key_set(channel, "{}/over"), "who still sends is called off"


def test_a_rank_that_is_gone_is_the_trainers_own_error():
    ranks, workers = Ranks(), Workers()
    channel = opened(ranks, workers)
    ranks.raises, workers.hangs = ConnectionError("peer"), True
    with pytest.raises(WriteFailed) as failed:
        asyncio.run(channel.deliver(workers, verify=False))
    assert failed.value.error is ranks.raises


def test_other_sums_are_a_failure():
    ranks, workers = Ranks(), Workers()
    channel = opened(ranks, workers)
    workers.sums = {"q[0:24]": 2}
    with pytest.raises(RuntimeError, match=r"1 of 1 places differ from what was written, first q\[0:24\]"):
        asyncio.run(channel.deliver(workers, verify=True))


def test_ranks_that_were_busy_when_the_engine_died_do_not_begin():
    ranks, workers = Ranks(), Workers()
    channel = opened(ranks, workers)
    ranks.free.clear()
    workers.fails = EngineDied("the engine's process ended")
    with pytest.raises(EngineDied):
        asyncio.run(channel.deliver(workers, verify=False))
    begin = workers.called[-1][1][0]
    ranks.free.set()
    while len(ranks.calls) < 2:  # in a thread of its own
        pass
    assert key_set(channel, "{}/over")
    assert not key_set(channel, begin)


def test_engines_take_turns_and_one_that_gives_up_leaves_the_turn_to_the_next():
    ranks = Ranks()
    first, second = opened(ranks), opened(ranks)
    order = []

    async def publish(channel, name, seconds):
        async with channel.turn():
            order.append(f"{name} begins")
            await asyncio.sleep(seconds)
            order.append(f"{name} ends")

    async def both():
        hung = asyncio.create_task(publish(first, "first", 60))
        await asyncio.sleep(0.02)
        waits = asyncio.create_task(publish(second, "second", 0))
        await asyncio.sleep(0.05)
        assert order == ["first begins"]
        hung.cancel()
        await waits

    asyncio.run(both())
    assert order == ["first begins", "second begins", "second ends"]
    assert not ranks.sending.locked()
