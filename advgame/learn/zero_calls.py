"""What rank 0 tells the members of a team to do with their shards, and how a member does it. Messages are JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from advgame.game.pairs import Group, Member, Pair
from advgame.game.tree import Sample
from advgame.learn.settings import LearnSettings
from advgame.learn.team import Json, Team
from advgame.learn.zero_files import Files
from advgame.learn.zero_send import Sending
from advgame.learn.zero_shard import ZeroShard
from advgame.publish.cuda_memory import device_id
from advgame.rollout.chat import load_tokenizer


def pairs_message(pairs: Sequence[Pair]) -> list[Json]:
    return [{**vars(pair), "chosen": vars(pair.chosen), "rejected": vars(pair.rejected)} for pair in pairs]


def groups_message(groups: Sequence[Group]) -> list[list[Json]]:
    return [[{**vars(member), "sample": vars(member.sample)} for member in group.members] for group in groups]


def samples_message(samples: Sequence[Sample]) -> list[Json]:
    return [vars(sample) for sample in samples]


def _sample(tree: Json) -> Sample:
    sequences = {name: tuple(tree[name]) for name in ("prompt_ids", "token_ids", "logprobs")}
    return Sample(**{**tree, **sequences})


def _pair(tree: Json) -> Pair:
    return Pair(**{**tree, "chosen": _sample(tree["chosen"]), "rejected": _sample(tree["rejected"])})


def _group(members: Sequence[Json]) -> Group:
    return Group(tuple(Member(**{**member, "sample": _sample(member["sample"])}) for member in members))


class Shardholder:
    """A member of `team` with its shards by player, and what it does when it is told to."""

    def __init__(self, team: Team):
        self.team = team
        self.shards: dict[str, ZeroShard] = {}
        self.sending = Sending(team)
        self.files = Files(team)

    def perform(self, message: Json) -> Any:
        """Makes the call that `message` names; its result, as JSON may have it."""
        if message["call"] == "make":
            return self._make(message)
        shard = self.shards[message["player"]]
        result: Any = getattr(self, f"_{message['call']}")(shard, message)
        return result

    def _make(self, message: Json) -> Json:
        player, folder = message["player"], Path(message["folder"])
        self.shards.pop(player, None)  # of the run before, with --seeds
        self.sending.forget(player)
        made = self.shards[player] = ZeroShard(
            self.team,
            folder,
            load_tokenizer(folder, player, remote_code=message["remote_code"]),
            LearnSettings.model_validate(message["settings"]),
            field=player,
            lr=message["lr"],
            ema=message["ema"],
            ahead=message["ahead"],
            remote_code=message["remote_code"],
        )
        devices = self.team.ranks.gather(device_id(self.team.device))
        return {"layout": made.shards.layout.tree(), "notes": made.notes, "devices": devices}

    def _pairs(self, shard: ZeroShard, message: Json) -> Mapping[str, float]:
        shard.reference.decided = message["decided"]
        return shard.update_pairs([_pair(pair) for pair in message["pairs"]], message["progress"])

    def _groups(self, shard: ZeroShard, message: Json) -> Mapping[str, float]:
        return shard.update_groups([_group(group) for group in message["groups"]], message["progress"])

    def _gap(self, shard: ZeroShard, message: Json) -> Mapping[str, float]:
        return vars(shard.sampler_gap([_sample(sample) for sample in message["samples"]]))

    def _average(self, shard: ZeroShard, message: Json) -> None:
        shard.average(message["decay"], message["keeps"])

    def _collect(self, shard: ZeroShard, message: Json) -> None:
        dtype = getattr(torch, message["dtype"])
        shard.shards.layout.give(shard.pieces(message["what"]), dtype, self.team)

    def _join(self, shard: ZeroShard, message: Json) -> Json:
        return self.sending.join(shard.shards.layout, message)

    def _send(self, shard: ZeroShard, message: Json) -> Json:
        return self.sending.send(shard.shards.layout, shard.pieces(message["what"]), message)

    def _sees(self, shard: ZeroShard, message: Json) -> list[str]:
        return self.files.blind(Path(message["folder"]), writes=True)

    def _write(self, shard: ZeroShard, message: Json) -> list[str]:
        return self.files.write(shard, message)

    def _read(self, shard: ZeroShard, message: Json) -> list[str]:
        return self.files.read(shard, message)
