"""Trainer and engine ranks at their meeting: memory for all or for none, reasons, strangers, ranks that never come."""

import os
import socket
import threading
from contextlib import suppress

import pytest
import torch
from test_plan import SOURCES, Fused, plan_of

from advgame.errors import InputError
from advgame.publish import cuda_memory, host
from advgame.publish.arena import SharedMemory
from advgame.publish.binding import bind, checksums, compare, open_part
from advgame.publish.destinations import Destinations
from advgame.publish.meeting import VARIABLE, Call, Meeting
from advgame.publish.plan import Plan
from advgame.publish.record import PlanRefused

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(host.missing() is not None, reason="no extension")


def rank_of(meeting, rank, world, *, refused=(), model=None, seen=None):
    """A rank in a thread of its own, as vLLM's worker would be in a process."""

    def run():
        call = Call(meeting.environment[VARIABLE])
        assert (call.model, call.sources) == ("fused", SOURCES)
        memory = call.answer(rank, world, "cpu", None if refused else plan_of(rank, world), refused)
        if seen is not None:
            seen[rank] = memory
        if memory is not None:
            bind(model, plan_of(rank, world), open_part(memory, CPU))
            call.settled()
        call.close()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize("world", [1, 2])
def test_parameters_move_into_the_trainers_memory(world):
    memory = SharedMemory()
    meeting = Meeting("fused", SOURCES, memory.grant, seconds=20)
    models = [Fused(rank, world) for rank in range(world)]
    with torch.no_grad():
        for model in models:
            model.norm.fill_(3)
    threads = [rank_of(meeting, rank, world, model=models[rank]) for rank in reversed(range(world))]
    plans = meeting.outcome(20)
    [thread.join() for thread in threads]
    meeting.close()
    memory.settled()
    assert [plan.rank for plan in plans] == list(range(world))
    assert all(model.norm.eq(3).all() for model in models), "what was loaded came along"
    made, tensors = Destinations(plans, memory.parts), {s.name: torch.randn(s.shape) for s in SOURCES}
    for name, tensor in tensors.items():
        made[name].copy_(tensor)
    made.settle()
    for rank, model in enumerate(models):
        loaded = Fused(rank, world)
        loaded.load_weights(tensors.items())
        for mine, theirs in zip(model.parameters(), loaded.parameters(), strict=True):
            assert torch.equal(mine, theirs)
        assert model.head.data_ptr() == model.embed.data_ptr()
        compare(checksums(model, plans[rank]), checksums(loaded, plans[rank]))
        loaded.norm.data[1] += 1
        with pytest.raises(RuntimeError, match="1 of 4 places differ from what was written, first norm"):
            compare(checksums(model, plans[rank]), checksums(loaded, plans[rank]))


def test_one_rank_that_refuses_leaves_all_where_they_are():
    seen = {}
    meeting = Meeting("fused", SOURCES, SharedMemory().grant, seconds=20)
    threads = [rank_of(meeting, 0, 2, seen=seen), rank_of(meeting, 1, 2, refused=["experts may move"], seen=seen)]
    with pytest.raises(PlanRefused, match="experts may move"):
        meeting.outcome(20)
    [thread.join() for thread in threads]
    meeting.close()
    assert seen == {0: None, 1: None}


def test_a_grant_that_fails_is_the_trainers_error():
    def grant(plans, devices):
        raise InputError("no memory")

    meeting = Meeting("fused", SOURCES, grant, seconds=20)
    thread = rank_of(meeting, 0, 1)
    with pytest.raises(InputError, match="no memory"):
        meeting.outcome(20)
    thread.join()
    meeting.close()


def test_strangers_and_ranks_that_never_come():
    meeting = Meeting("fused", SOURCES, SharedMemory().grant, seconds=20)
    name, _, seconds = meeting.environment[VARIABLE].split()
    with pytest.raises(ConnectionError, match="gone"):
        Call(f"{name} wrong {seconds}")
    with pytest.raises(RuntimeError, match="without asking where its weights should live"):
        meeting.outcome(0.1)
    meeting.close()


@pytest.mark.parametrize(
    "says", [b"", b"no json\n", b'["a list"]\n', b"\xff\xfe\n", b'{"token": 3}\n', b"x" * 3_000_000], ids=str
)
def test_a_stranger_spoils_nothing(says, monkeypatch):
    """It hangs up, talks nonsense, never ends its line or never says anything: the engine is served all the same."""
    monkeypatch.setattr("advgame.publish.meeting.GREETING_S", 0.2)
    memory, model = SharedMemory(), Fused()
    meeting = Meeting("fused", SOURCES, memory.grant, seconds=20)
    name = meeting.environment[VARIABLE].split()[0]
    with socket.socket(socket.AF_UNIX) as silent, socket.socket(socket.AF_UNIX) as other:
        for one in (silent, other):
            one.connect(f"\0{name}")
        sender = threading.Thread(target=lambda: suppressed(other.sendall, says))
        sender.start()
        thread = rank_of(meeting, 0, 1, model=model)
        assert len(meeting.outcome(10)) == 1
        thread.join()
        sender.join()
    meeting.close()


def suppressed(call, *arguments):
    with suppress(OSError):
        call(*arguments)


@pytest.mark.parametrize("who", ["trainer", "engine"])
def test_another_user_is_turned_away(monkeypatch, who):
    """By the kernel's word for who is at the other end, whatever the token."""
    meeting = Meeting("fused", SOURCES, SharedMemory().grant, seconds=20)
    looks = threading.main_thread() if who == "engine" else meeting._thread
    user = lambda *_: (1, os.getuid() + (threading.current_thread() is looks), 1)  # noqa: E731
    monkeypatch.setattr("advgame.publish.meeting.struct.unpack", user)
    says = "somebody else answers" if who == "engine" else "gone|reset|[Bb]roken"
    with pytest.raises(OSError, match=says):
        Call(meeting.environment[VARIABLE])
    meeting.close()


def test_who_is_turned_away_holds_no_file(monkeypatch):
    monkeypatch.setattr("advgame.publish.meeting.GREETING_S", 0.05)
    memory, model = SharedMemory(), Fused()
    meeting = Meeting("fused", SOURCES, memory.grant, seconds=20)
    name = meeting.environment[VARIABLE].split()[0]
    strangers = [socket.socket(socket.AF_UNIX) for _ in range(40)]
    for one in strangers:
        one.connect(f"\0{name}")
        one.sendall(b"no json\n")
    [one.recv(1) for one in strangers]  # until the other side hangs up
    assert not meeting._connections
    thread = rank_of(meeting, 0, 1, model=model)
    assert len(meeting.outcome(10)) == 1
    thread.join()
    meeting.close()
    [one.close() for one in strangers]


def test_a_rank_that_comes_after_an_error_is_not_kept_waiting():
    def fails(plans, devices):
        raise InputError("no memory")

    meeting = Meeting("fused", SOURCES, fails, seconds=1000)
    rank_of(meeting, 0, 1).join()
    with pytest.raises(InputError, match="no memory"):
        meeting.outcome(20)
    with pytest.raises(OSError, match="refused"):
        Call(meeting.environment[VARIABLE])
    meeting.close()


def test_a_plan_that_changed_on_its_way_is_refused_by_both_sides(monkeypatch):
    from dataclasses import replace

    spoilt = replace(plan_of(), model="another")
    meeting = Meeting("fused", SOURCES, SharedMemory().grant, seconds=20)
    monkeypatch.setattr(Plan, "from_tree", lambda tree: spoilt)
    thread = rank_of(meeting, 0, 1)
    with pytest.raises(PlanRefused, match="not the one that the engine made"):
        meeting.outcome(20)
    thread.join()
    meeting.close()
    monkeypatch.undo()

    meeting = Meeting("fused", SOURCES, lambda plans, devices: [{"kind": "shm"}], seconds=20)
    call, own = Call(meeting.environment[VARIABLE]), plan_of()
    read = call._line.read
    monkeypatch.setattr(call._line, "read", lambda: read() | {"hash": spoilt.hash})
    with pytest.raises(RuntimeError, match="by another plan"):
        call.answer(0, 1, "cpu", own)
    call.close()
    meeting.close()


def test_closing_does_not_wait_for_a_rank_that_hangs():
    meeting = Meeting("fused", SOURCES, SharedMemory().grant, seconds=1000)
    call = Call(meeting.environment[VARIABLE])  # and then it says nothing
    meeting.close()
    call.close()


def test_the_engines_gpu_must_be_visible_here():
    assert cuda_memory.local_device("b", ["a", "b"]) == 1
    with pytest.raises(InputError, match="GPU c visible to the trainer too"):
        cuda_memory.local_device("c", ["a", "b"])
