"""Publishing from many ranks: how rank 0 tells a team to send its shards, and what each member does then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from advgame.learn.layout import Layout, Span
from advgame.learn.team import Call, Json, Team
from advgame.publish import group as groups
from advgame.publish.buckets import Layout as Buckets
from advgame.publish.pieces import PieceSender, digest, messages_of


class TeamSenders:
    """A team that sends `player`, as rank 0 sees it (`publish.sharded.Senders`). own: makes rank 0's part of a call."""

    def __init__(self, team: Team, player: str, layout: Layout, devices: Sequence[str], own: Call):
        self._team, self._player, self._own = team, player, own
        self.held: Sequence[Mapping[str, Span]] = [spans for _, spans in layout.givers]
        self.devices: Sequence[str] = [devices[layout.members.index(rank)] for rank, _ in layout.givers]
        self.sending = team.sending

    def tell(self, call: str, told: Callable[[], None], **details: Any) -> dict[str, Any]:
        message = {"call": call, "player": self._player, **details}
        with self._team.turn(message):
            told()
            answer: dict[str, Any] = self._team.call(message, self._own)
            return answer


class Sending:
    """A member's part: its ways to engines, by player and engine. Nothing that happens there ends the member."""

    def __init__(self, team: Team):
        self._team = team
        self._ways: dict[tuple[str, str], PieceSender] = {}

    def forget(self, player: str) -> None:
        """Leaves the groups of a player that is made anew."""
        for key in [key for key in self._ways if key[0] == player]:
            self._leave(key)

    def join(self, layout: Layout, message: Json) -> Json:
        """Meets the workers of an engine that has just started."""
        return self._answer(layout, lambda number: self._join(layout, number, message))

    def send(self, layout: Layout, pieces: Mapping[str, Tensor], message: Json) -> Json:
        """Sends this rank's pieces to an engine's workers."""
        return self._answer(layout, lambda _: self._send(pieces, message))

    def _answer(self, layout: Layout, act: Callable[[int], dict[str, int]]) -> Json:
        """What all members have to say; everybody's is gathered, since rank 0 hears one of them."""
        ranks = [rank for rank, _ in layout.givers]
        error, sums = None, dict[str, int]()
        if self._team.rank in ranks:
            try:
                with self._on_device():
                    sums = act(ranks.index(self._team.rank))
            except Exception as raised:
                said = " ".join(str(raised).split())[:160]
                error = f"rank {self._team.rank} could not send its shard: {type(raised).__name__}: {said}"
        found = self._team.ranks.gather((error, sums))
        return {
            "errors": [text for text, _ in found],
            "sums": {name: value for _, own in found for name, value in own.items()},
        }

    def _on_device(self) -> AbstractContextManager[None]:
        """Threads begin on the first GPU."""
        device = self._team.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def _join(self, layout: Layout, number: int, message: Json) -> dict[str, int]:
        how, key = message["how"], (message["player"], message["key"])
        self._leave(key)
        buckets, (_, spans) = Buckets.from_tree(message["layout"]), layout.givers[number]
        messages = messages_of(buckets, [held for _, held in layout.givers], how["limit"])
        if digest(messages) != how["messages"]:
            raise RuntimeError("it cuts its shard into other messages than rank 0")
        try:
            store = groups.reach(how["host"], how["port"], how["seconds"])
        except RuntimeError as error:
            raise RuntimeError(
                f"rank 0 is not reached at {how['host']}:{how['port']}; set rollout.vllm.rendezvous_host to its address"
            ) from error
        called_off = groups.whether(how["host"], how["port"], how["over"], how["seconds"])
        if called_off():
            raise RuntimeError("called off")
        name, size, device = f"{how['name']}/{number}", how["size"], self._team.device

        def met() -> Any:
            with self._on_device():
                made = groups.join(store, name, 0, size, device=device, host=how["host"], seconds=how["seconds"])
                groups.greet(made, device, how["seconds"])
                return made

        group = groups.limited(met, 2 * how["seconds"], called_off)
        own = [m for m in messages if m.sender == number]
        self._ways[key] = PieceSender(buckets, own, spans, group, device, called_off)
        return {}

    def _send(self, pieces: Mapping[str, Tensor], message: Json) -> dict[str, int]:
        key = (message["player"], message["key"])
        way = self._ways.get(key)
        if way is None:
            raise RuntimeError("it has left the engine's group")
        try:
            return way.send(pieces, message["seconds"], verify=message["verify"])
        except BaseException:
            self._leave(key)
            raise

    def _leave(self, key: tuple[str, str]) -> None:
        way = self._ways.pop(key, None)
        if way is not None:
            groups.leave(way.group)
