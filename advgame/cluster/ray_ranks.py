"""Trainer ranks as Ray actors: they follow the process that was started, which leads them and trains nothing itself."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from advgame.cluster.ray_cluster import Cluster
from advgame.cluster.ray_process import BEAT_S, END_S, kill
from advgame.errors import InputError, RanksDied
from advgame.learn.team import Teams, seated, teams_of
from advgame.learn.watch import Watch
from advgame.publish.group import open_store

TRIES, TRY_S = 5, 2.0
"""Starts, and seconds between them, for actors that die before they are there: when a node has just died, Ray may not
have heard of it yet and start them on it."""

_STORE = timedelta(minutes=30)
"""Longest wait of a rank for what another one puts into the store: torch's own for groups over gloo."""


@dataclass(frozen=True)
class RankOrder:
    """What a rank is told at the start. rank: of 1 to `ranks`, 0 leads; name: what this start's groups are called in
    the store; gpu: whether ranks compute on one; threads: torch's on a CPU."""

    rank: int
    ranks: int
    attacker_ranks: int | None
    host: str
    port: int
    name: str
    gpu: bool
    threads: int | None

    def teams(self, store: dist.Store, watch: Watch | None = None) -> Teams:
        """This rank's; returns when all ranks are there."""
        if self.host.startswith("127."):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a cluster of this machine alone
        device = torch.device("cuda", 0) if self.gpu and self.rank else torch.device("cpu")
        members = teams_of(1, self.ranks, self.attacker_ranks)
        return Teams(members, self.rank, device, dist.PrefixStore(self.name, store), watch)


class RankActor:
    """One rank, on the node of its bundle. Two threads: `follow` in one, `alive` in the other."""

    def ready(self) -> int:
        """Imports what takes seconds, so that nobody holds that silence against it; returns the process id."""
        from advgame.learn.zero_quiet import quietly

        with quietly():
            if not torch.cuda.is_available():
                os.environ.setdefault("DS_ACCELERATOR", "cpu")
            import deepspeed  # noqa: F401

            import advgame.learn.zero_calls  # noqa: F401
        return os.getpid()

    def follow(self, order: RankOrder) -> None:
        """Does what rank 0 says until it lets the ranks go."""
        (own,) = [team for team in teams_of(1, order.ranks, order.attacker_ranks) if order.rank in team]
        for name, value in (("RANK", own.index(order.rank)), ("WORLD_SIZE", len(own)), ("LOCAL_RANK", 0)):
            os.environ[name] = str(value)  # DeepSpeed reads them; of a node's GPUs Ray shows each actor its own
        if order.gpu:
            torch.cuda.set_device(0)
        store = dist.TCPStore(order.host, order.port, None, False, _STORE)
        with seated(order.teams(store)) as made:
            made.follow(order.threads)

    def alive(self) -> bool:
        return True


class RayRanks:
    """The ranks of one start. watch: who learns of their deaths; process_ids: by rank, on their nodes."""

    def __init__(self, cluster: Cluster, attacker_ranks: int | None, threads: int | None):
        self.watch = Watch()
        self.process_ids: list[int] = []
        self._cluster = cluster
        self._attacker_ranks, self._threads = attacker_ranks, threads
        self._actors: list[Any] = []
        self._following: list[Any] = []
        self._over = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True, name="advgame-rank-watch")

    def start(self) -> Teams:
        """Starts every rank's actor and meets them. Raises RanksDied, or InputError if a node lacks something."""
        settings, bundles = self._cluster.settings, self._cluster.ranks
        over = time.monotonic() + settings.trainer_start_s
        for left in reversed(range(TRIES)):
            try:
                self._open(over - time.monotonic())
                break
            except GetTimeoutError:
                why = self._cluster.without_room()
                raise RanksDied(
                    f"the trainer's ranks have not started within {settings.trainer_start_s:g} s"
                    + (f": {why}" if why else "")
                ) from None
            except RayError as error:
                self._kill()
                if not left or isinstance(error, RayTaskError):
                    raise _as_told("a trainer rank that was to start", error) from None
                time.sleep(TRY_S)
        host = self._cluster.host
        store = open_store(host, 0, "cluster.address")
        name, gpu = f"ranks-{secrets.token_hex(4)}", any(bundle.gpus for bundle in bundles)
        orders = [
            RankOrder(rank, len(bundles), self._attacker_ranks, host, store.port, name, gpu, self._threads)
            for rank in range(len(bundles) + 1)
        ]
        self._following = [actor.follow.remote(order) for actor, order in zip(self._actors, orders[1:], strict=True)]
        self._watching.start()
        return orders[0].teams(store, self.watch)

    def _open(self, seconds: float) -> None:
        """An actor in every bundle, with what it imports. Raises RayError, GetTimeoutError after `seconds`."""
        self._actors = [
            ray.remote(RankActor).options(max_concurrency=2, **self._cluster.options(bundle)).remote()
            for bundle in self._cluster.ranks
        ]
        self.process_ids = ray.get([actor.ready.remote() for actor in self._actors], timeout=max(0.0, seconds))

    def end(self, *, told: bool) -> None:
        """Ends every actor; `told`: they have been let go and end in their own time."""
        self._over.set()
        if told and self._following:
            with suppress(RayError):
                ray.wait(self._following, num_returns=len(self._following), timeout=END_S)
        self._kill()
        if self._watching.is_alive():
            self._watching.join()

    def _kill(self) -> None:
        for actor in self._actors:
            kill(actor)

    def _watch(self) -> None:
        """Until one rank dies, fails or falls silent: then all are ended."""
        while not self._over.wait(BEAT_S):
            if (death := self._death()) is not None:
                if not self._over.is_set():
                    self._kill()
                    self.watch.died(death)
                return

    def _death(self) -> Exception | None:
        beats = [actor.alive.remote() for actor in self._actors]
        if (silent := self._silent(beats)) is not None:
            return RanksDied(f"trainer rank {silent + 1} has said nothing for {self._cluster.settings.silence_s:g} s")
        errors = self._errors(beats) + self._errors(self._following)
        if errors and all(isinstance(error, RayTaskError) for _, error in errors):
            time.sleep(BEAT_S)  # it may have failed of another one's death, which is told next
            errors = self._errors([actor.alive.remote() for actor in self._actors], BEAT_S) + errors
        return _as_told(f"trainer rank {errors[0][0] + 1}", errors[0][1]) if errors else None

    def _silent(self, beats: Sequence[Any]) -> int | None:
        """The first who does not answer in time."""
        limit = self._cluster.settings.silence_s
        while True:
            since = time.monotonic()
            _, late = ray.wait(list(beats), num_returns=len(beats), timeout=limit)
            if not late:
                return None
            # this process itself may have been held up: then nobody was silent, the answer was not heard
            if time.monotonic() - since < limit + BEAT_S:
                return list(beats).index(late[0])

    def _errors(self, calls: Sequence[Any], seconds: float = 0.0) -> list[tuple[int, RayError]]:
        """Of the calls that have failed within `seconds`: whose, and how."""
        ended, _ = ray.wait(list(calls), num_returns=len(calls), timeout=seconds)
        found = []
        for call in ended:
            try:
                ray.get(call)
            except RayError as error:
                found.append((list(calls).index(call), error))
        return found


@contextmanager
def led(cluster: Cluster, attacker_ranks: int | None, threads: int | None) -> Iterator[Watch]:
    """Inside, ranks of the cluster train what this process leads, and it hears of their deaths.

    attacker_ranks: so many train the Attacker alone, the rest the Defender; None: all train both. threads: torch's CPU
    threads of every rank.
    """
    ranks = RayRanks(cluster, attacker_ranks, threads)
    told = False
    try:
        made = ranks.start()
        with seated(made):
            yield ranks.watch
        told = not made.broken
    finally:
        ranks.end(told=told)


def _as_told(who: str, error: RayError) -> Exception:
    """What the user reads of a Ray error; InputError where new ranks would fail of the same."""
    if not isinstance(error, RayTaskError):
        return RanksDied(f"{who} died ({type(error).__name__})")
    cause = error.cause or error
    text = " ".join(str(cause).split())
    if isinstance(cause, ModuleNotFoundError):
        return InputError(f"cluster.trainer_ranks: a node has {text}; install advgame[deepspeed] on every node")
    return InputError(text) if isinstance(cause, InputError) else RanksDied(f"{who}: {type(cause).__name__}: {text}")
