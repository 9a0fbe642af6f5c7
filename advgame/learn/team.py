"""Who trains what: rank 0 leads, the others do what it says, one call at a time.

Rank 0 plays, records and publishes. A team is the ranks that train together, with a channel from rank 0 to them; both
players on one team, or one on each of two. Within a team calls come in one order, so that its ranks meet every
collective in the same order. What travels is JSON. Under torchrun rank 0 trains too; on a Ray cluster it is a member
of no team (cluster/ray_ranks.py).
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from advgame.errors import InputError, RanksDied
from advgame.learn.ranks import Ranks
from advgame.learn.watch import Watch
from advgame.learn.zero_config import launched

Json = Mapping[str, Any]
Call = Callable[[Json], Any]
T = TypeVar("T")

_PATIENCE = timedelta(days=20)
"""How long a rank waits for the next call: as long as a step's play may take, in milliseconds of 31 bits."""


class Team:
    """Ranks that train together. members: global ranks; rank: this one, globally; ranks: what a member adds up over
    them; device: where this rank computes; watch: on a rank 0 that somebody tells when a member dies.

    To torch.distributed, and so to DeepSpeed, a member's team is the whole world: DeepSpeed waits at barriers of all
    ranks. Rank 0 reaches the members by a channel beside it, whether it is one of them or not.
    """

    def __init__(
        self, members: Sequence[int], rank: int, device: torch.device, store: dist.Store, watch: Watch | None = None
    ):
        self.members = tuple(members)
        self._watch = watch
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
            size = len(self._reached)
            self._channel = self._alive(lambda: dist.ProcessGroupGloo(between, place, size, _PATIENCE))
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

    def _alive(self, call: Callable[[], T]) -> T:
        """A call that waits for other ranks: RanksDied when one of them dies, if somebody watches them."""
        return call() if self._watch is None else self._watch.unless_died(call)

    def check(self) -> None:
        """On rank 0: raises RanksDied if somebody is known to have died."""
        if self._watch is not None:
            self._watch.check()

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

        def both() -> bytes:
            length = torch.tensor([0 if data is None else len(data)])
            self._channel.broadcast(length, place).wait()
            body = torch.empty(int(length), dtype=torch.uint8)
            if data is not None:
                body = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            self._channel.broadcast(body, place).wait()
            return body.numpy().tobytes() if data is None else data

        return self._alive(both)

    def send(self, tensor: Tensor, to: int) -> None:
        """From or to rank 0: a contiguous tensor, through host memory where rank 0 is no member."""
        if 0 in self.members:
            dist.send(tensor, self.members.index(to))
        else:
            landed = tensor.cpu()
            self._alive(lambda: self._channel.send([landed], self._reached.index(to), 0).wait())

    def receive(self, into: Tensor, source: int) -> None:
        """Fills a contiguous tensor with what `source` sends."""
        if 0 in self.members:
            dist.recv(into, self.members.index(source))
            return
        landed = into if into.device.type == "cpu" else torch.empty_like(into, device="cpu")
        self._alive(lambda: self._channel.recv([landed], self._reached.index(source), 0).wait())
        if landed is not into:
            into.copy_(landed)

    def stop(self) -> None:
        """Lets the members go."""
        if self.leads and not self.broken:
            with suppress(RanksDied, InputError):  # what their watch was told: gone they are
                self._tell({"call": "stop"})


def teams_of(first: int, ranks: int, attacker_ranks: int | None) -> list[range]:
    """Who trains together, of `ranks` ranks from `first` on: all, or so many the Attacker and the rest the Defender."""
    cut, end = first + (ranks if attacker_ranks is None else attacker_ranks), first + ranks
    return [members for members in (range(first, cut), range(cut, end)) if members]


class Teams:
    """All teams of this process: one that trains every player, or the Attacker's and the Defender's."""

    def __init__(
        self,
        members: Sequence[range],
        rank: int,
        device: torch.device,
        store: dist.Store,
        watch: Watch | None = None,
    ):
        self.leads = rank == 0
        self._all = [Team(one, rank, device, store, watch) for one in members]

    @classmethod
    def launched(cls, attacker_ranks: int | None = None) -> Teams:
        """Of the ranks that torchrun started; without it, of this process alone."""
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
        return cls(teams_of(0, size, attacker_ranks), rank, device, store)

    def of(self, player: str) -> Team:
        """The team that trains `player` (attacker, defender or shared)."""
        return self._all[-1 if player == "defender" else 0]

    @property
    def own(self) -> Team:
        """The one that this rank is a member of."""
        (team,) = [team for team in self._all if team.member]
        return team

    @property
    def broken(self) -> bool:
        """Whether a call was cut short, so that nobody can be told anything."""
        return any(team.broken for team in self._all)

    def follow(self, threads: int | None) -> None:
        """On the other ranks: does what rank 0 says until it lets them go. threads: torch's CPU threads meanwhile."""
        from advgame.learn.zero_calls import Shardholder

        if threads is not None:
            torch.set_num_threads(threads)
        self.own.follow(Shardholder(self.own).perform)

    def close(self, *, broken: bool) -> None:
        broken = broken or self.broken
        for team in self._all:
            team.broken = broken
            team.stop()
        if not broken and any(team.member for team in self._all):
            dist.destroy_process_group()


_teams: Teams | None = None


def teams() -> Teams:
    """This process's teams, which `seated` knows; without it a team of this process alone."""
    global _teams
    if _teams is None:
        _teams = Teams.launched()
    return _teams


@contextmanager
def seated(made: Teams) -> Iterator[Teams]:
    """Inside, these are this process's teams; at the end rank 0 lets the others go."""
    global _teams
    _teams = made
    broken = False
    try:
        yield made
    except BaseException:
        broken = not made.leads
        raise
    finally:
        made.close(broken=broken)
        _teams = None


@contextmanager
def joined(threads: int | None, attacker_ranks: int | None = None) -> Iterator[bool]:
    """Inside, True on the rank that runs the command. The others are done when they get there, and see False.

    threads: torch's CPU threads of the ranks that do not play. attacker_ranks: so many train the Attacker alone, the
    rest the Defender; None: all train both.
    """
    with seated(Teams.launched(attacker_ranks)) as made:
        if not made.leads:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides when it is over
            made.follow(threads)
        yield made.leads
