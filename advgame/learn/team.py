"""Who trains what under torchrun: rank 0 leads, the others do what it says, one call at a time.

Rank 0 plays, records and publishes. A team is the ranks that train together, with a channel from rank 0 to them; both
players on one team, or one on each of two. Within a team calls come in one order, so that its ranks meet every
collective in the same order. What travels is JSON.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from advgame.learn.ranks import Ranks
from advgame.learn.zero_config import launched

Json = Mapping[str, Any]
Call = Callable[[Json], Any]

_PATIENCE = timedelta(days=20)
"""How long a rank waits for the next call: as long as a step's play may take, in milliseconds of 31 bits."""


class Team:
    """Ranks that train together. members: global ranks; rank: this one, globally; ranks: what a member adds up over
    them; device: where this rank computes.

    To torch.distributed, and so to DeepSpeed, a member's team is the whole world: DeepSpeed waits at barriers of all
    ranks. Rank 0 reaches the members by a channel beside it, whether it is one of them or not.
    """

    def __init__(self, members: Sequence[int], rank: int, device: torch.device, store: dist.Store):
        self.members = tuple(members)
        self.rank = rank
        self.device = device
        self.member = rank in self.members
        if self.member:
            backend = "nccl" if device.type == "cuda" else "gloo"
            own = dist.PrefixStore(f"team {members[0]}", store)
            dist.init_process_group(backend, store=own, rank=self.members.index(rank), world_size=len(members))
        self.ranks = Ranks(dist.group.WORLD if self.member and len(members) > 1 else None)
        self._reached = sorted({0, *members})
        self._channel: Any = None
        if rank in self._reached and len(self._reached) > 1:
            between = dist.PrefixStore(f"channel {members[0]}", store)
            place = self._reached.index(rank)
            self._channel = dist.ProcessGroupGloo(between, place, len(self._reached), _PATIENCE)
        self._turn = threading.Lock()
        self.sending = threading.Lock()  # of a publish to one engine (publish/sharded.py)
        self.broken = False

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, member or not."""
        return self.rank == 0

    @contextmanager
    def turn(self, message: Json) -> Iterator[None]:
        """On rank 0: tells the members to make a call and holds every other call off until the block ends."""
        with self._turn:
            self._tell(message)
            try:
                yield
            except BaseException:
                self.broken = True  # the others may be in the middle of a collective: nobody can be told anything
                raise

    def call(self, message: Json, own: Call) -> Any:
        """On rank 0, in a turn: the result of the call, made by `own` here if rank 0 is a member."""
        return own(message) if 0 in self.members else json.loads(self._broadcast(None, self.members[0]))

    def follow(self, own: Call) -> None:
        """On the other ranks: does what rank 0 says, until it says `stop`."""
        while (message := json.loads(self._broadcast(None, 0)))["call"] != "stop":
            result = own(message)
            if 0 not in self.members and not message.get("silent"):
                # to rank 0 from the first member; everybody on the channel takes part
                first = self.rank == self.members[0]
                self._broadcast(json.dumps(result).encode() if first else None, self.members[0])

    def _tell(self, message: Json) -> None:
        if self._channel is not None:
            self._broadcast(json.dumps(message).encode(), 0)

    def _broadcast(self, data: bytes | None, source: int) -> bytes:
        """Everybody's: what `source` has; the others give None."""
        place = self._reached.index(source)
        length = torch.tensor([0 if data is None else len(data)])
        self._channel.broadcast(length, place).wait()
        body = torch.empty(int(length), dtype=torch.uint8)
        if data is not None:
            body = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._channel.broadcast(body, place).wait()
        return body.numpy().tobytes() if data is None else data

    def send(self, tensor: Tensor, to: int) -> None:
        """From or to rank 0: a contiguous tensor, through host memory where rank 0 is no member."""
        if 0 in self.members:
            dist.send(tensor, self.members.index(to))
        else:
            self._channel.send([tensor.cpu()], self._reached.index(to), 0).wait()

    def receive(self, into: Tensor, source: int) -> None:
        """Fills a contiguous tensor with what `source` sends."""
        if 0 in self.members:
            dist.recv(into, self.members.index(source))
            return
        landed = into if into.device.type == "cpu" else torch.empty_like(into, device="cpu")
        self._channel.recv([landed], self._reached.index(source), 0).wait()
        if landed is not into:
            into.copy_(landed)

    def stop(self) -> None:
        """Lets the members go."""
        if self.leads and not self.broken:
            self._tell({"call": "stop"})


class Teams:
    """All teams of this process: one that trains every player, or the Attacker's and the Defender's."""

    def __init__(self, attacker_ranks: int | None = None):
        size, rank = launched(), int(os.environ.get("RANK", "0"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        gpu = torch.cuda.is_available()
        device = torch.device("cuda", local) if gpu else torch.device("cpu")
        if gpu:
            torch.cuda.set_device(device)
        for name, value in (("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", local)):
            os.environ.setdefault(name, str(value))  # DeepSpeed reads them
        if size == 1 and "MASTER_ADDR" not in os.environ:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nobody else is to be reached
            store: dist.Store = dist.HashStore()
        else:
            store, _, _ = next(rendezvous("env://"))
        self.leads = rank == 0
        cut = size if attacker_ranks is None else attacker_ranks
        self._all = [Team(members, rank, device, store) for members in (range(cut), range(cut, size)) if members]

    def of(self, player: str) -> Team:
        """The team that trains `player` (attacker, defender or shared)."""
        return self._all[-1 if player == "defender" else 0]

    @property
    def own(self) -> Team:
        """The one that this rank is a member of."""
        (team,) = [team for team in self._all if team.member]
        return team

    def close(self, *, broken: bool) -> None:
        broken = broken or any(team.broken for team in self._all)
        for team in self._all:
            team.broken = broken
            team.stop()
        if not broken:
            dist.destroy_process_group()


_teams: Teams | None = None


def teams() -> Teams:
    """This process's teams, which `joined` made; without it a team of this process alone."""
    global _teams
    if _teams is None:
        _teams = Teams()
    return _teams


@contextmanager
def joined(threads: int | None, attacker_ranks: int | None = None) -> Iterator[bool]:
    """Inside, True on the rank that runs the command. The others are done when they get there, and see False.

    threads: torch's CPU threads of the ranks that do not play. attacker_ranks: so many train the Attacker alone, the
    rest the Defender; None: all train both.
    """
    global _teams
    _teams = made = Teams(attacker_ranks)
    broken = False
    try:
        if not made.leads:
            from advgame.learn.zero_calls import Shardholder

            signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides when it is over
            if threads is not None:
                torch.set_num_threads(threads)
            made.own.follow(Shardholder(made.own).perform)
        yield made.leads
    except BaseException:
        broken = not made.leads
        raise
    finally:
        made.close(broken=broken)
        _teams = None
