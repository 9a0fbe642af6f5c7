"""The ranks that train together: rank 0 leads, the others do what it says, one call at a time.

Rank 0 plays, records and publishes; for every call of a learner that needs all shards it tells the others what to do,
and all do it at once. One lock over all players orders the calls, so that every rank meets every collective in the same
order. What travels is JSON; nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Call = Callable[[Mapping[str, Any]], Any]

_PATIENCE = timedelta(days=20)
"""How long a rank waits for the next call: as long as a step's play may take, in milliseconds of 31 bits."""


class Team:
    """The ranks of this run and the lock that orders their calls. rank, size; device: where this rank computes."""

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", local) if gpu else torch.device("cpu")
        if gpu:
            torch.cuda.set_device(self.device)
        for name, value in (("RANK", self.rank), ("WORLD_SIZE", self.size), ("LOCAL_RANK", local)):
            os.environ.setdefault(name, str(value))  # DeepSpeed reads them
        backend = "nccl" if gpu else "gloo"
        if self.size == 1 and "MASTER_ADDR" not in os.environ:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nobody else is to be reached
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend)
        self._calls = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._turn = threading.Lock()
        self.broken = False

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @contextmanager
    def turn(self, call: str, /, **details: Any) -> Iterator[None]:
        """On rank 0: tells the others to make `call` and holds everyone else off until the block ends."""
        with self._turn:
            self.tell({"call": call, **details})
            try:
                yield
            except BaseException:
                self.broken = True  # the others may be in the middle of a collective: nobody can be told anything
                raise

    def tell(self, message: Mapping[str, Any]) -> None:
        if self.size > 1:
            self._broadcast(json.dumps(message).encode())

    def follow(self, calls: Mapping[str, Call]) -> None:
        """On the other ranks: does what rank 0 says, until it says `stop`."""
        while True:
            message = json.loads(self._broadcast(None))
            if message["call"] == "stop":
                return
            calls[message.pop("call")](message)

    def _broadcast(self, data: bytes | None) -> bytes:
        length = torch.tensor([0 if data is None else len(data)])
        dist.broadcast(length, 0, group=self._calls)
        if data is None:
            body = torch.empty(int(length), dtype=torch.uint8)
        else:
            body = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(body, 0, group=self._calls)
        return body.numpy().tobytes() if data is None else data

    def everyones(self, value: Any) -> list[Any]:
        """A JSON-able value of every rank, in rank order; all ranks call it."""
        if self.size == 1:
            return [value]
        data = json.dumps(value).encode()
        lengths = torch.zeros(self.size, dtype=torch.long)
        lengths[self.rank] = len(data)
        dist.all_reduce(lengths, group=self._calls)
        bodies = torch.zeros(self.size, int(lengths.max()), dtype=torch.uint8)
        bodies[self.rank, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.all_reduce(bodies, group=self._calls)
        return [json.loads(row[:n].numpy().tobytes()) for row, n in zip(bodies, lengths.tolist(), strict=True)]

    def sum(self, values: Tensor) -> Tensor:
        """Added up over all ranks; all ranks call it."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def close(self) -> None:
        if self.leads and not self.broken:
            self.tell({"call": "stop"})
        if not self.broken:
            dist.destroy_process_group()


_team: Team | None = None


def team() -> Team:
    """This process's team, which `joined` made; without it a team of one."""
    global _team
    if _team is None:
        _team = Team()
    return _team


@contextmanager
def joined(threads: int | None) -> Iterator[bool]:
    """Inside, True on the rank that runs the command. The others are done when they get there, and see False.

    `threads`: torch's CPU threads of the ranks that do not play.
    """
    global _team
    made = team()
    try:
        if not made.leads:
            from advgame.learn.zero_learner import Followers

            signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides when it is over
            if threads is not None:
                torch.set_num_threads(threads)
            made.follow(Followers(made).calls)
        yield made.leads
    except BaseException:
        made.broken = made.broken or not made.leads
        raise
    finally:
        made.close()
        _team = None
