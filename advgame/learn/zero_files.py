"""What a rank writes of a sharded player into a checkpoint, and what it reads of one.

No rank ever holds more of a player than it trains and the parameters that it writes, 20 bytes each at most, which are
near its share of all of them.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from advgame.learn.part_files import note_name, numbered, own_storage, write_part
from advgame.learn.shards import MOMENTS, kinds
from advgame.learn.stored import copy_model, copy_tensors, files_of, stored
from advgame.learn.team import Json, Team
from advgame.learn.zero_shard import ZeroShard
from advgame.rollout.chat import first_line

SEEN_S = 10.0
"""So long a folder that another node has just made may take to be seen here."""


class Files:
    """A member's part. Every call is made by all members together, and returns what is wrong anywhere."""

    def __init__(self, team: Team):
        self._team = team
        self._thread = ThreadPoolExecutor(1, "part")
        self._writing: list[Future[None]] = []

    def write(self, shard: ZeroShard, message: Json) -> list[str]:
        """Copies what this rank writes into host memory; writes it in a thread if `message` says beside."""
        for ended in [work for work in self._writing if work.done()]:
            self._writing.remove(ended)
            ended.result()  # a note that could not be left is told now at the latest
        folder, player = Path(message["folder"]), message["name"]
        if errors := self.blind(folder, writes=True):
            return errors
        layout, steps = shard.shards.layout, shard.shards.steps
        held = {
            what: layout.regroup(shard.pieces(what), self._team)
            for what in kinds(steps, averaged=shard.averaged, previous=message["previous"])
        }
        ranks = [rank for rank, _ in layout.writers]
        if self._team.rank in ranks:
            number, of = ranks.index(self._team.rank), len(ranks)
            files = _files(shard, steps, held, player, number, of)
            work = partial(write_part, folder, note_name(player, number, of), files, self._who)
            if message["beside"]:
                self._writing.append(self._thread.submit(work))
            else:
                work()
        return []

    def read(self, shard: ZeroShard, message: Json) -> list[str]:
        """Fills this rank's pieces from a checkpoint that any number of ranks has written."""
        folder, player, previous = Path(message["folder"]), message["name"], message["previous"]
        if errors := self.blind(folder, writes=False):
            return errors
        spans = shard.shards.layout.held[self._team.members.index(self._team.rank)]
        error = None

        def fill(what: str, pieces: Mapping[str, Tensor]) -> None:
            if what in MOMENTS:
                named = {f"{what}/{name}": piece for name, piece in pieces.items()}
                copy_tensors(moments, named, {f"{what}/{name}": span for name, span in spans.items()})
            elif what == "previous" and previous != f"{player}-ema":
                copy_tensors(files_of(folder, previous), pieces, spans)
            else:
                copy_model(folder / (player if what == "live" else f"{player}-ema"), shard.model, pieces, spans)

        try:
            moments = files_of(folder, f"optimizer-{player}")
            steps = max((float(t) for name, t in stored(moments) if name.startswith("step/")), default=0.0)
            shard.take_pieces(steps, previous is not None, fill)
        except (OSError, SafetensorError) as raised:
            error = f"{self._who}: {first_line(raised)}"
        if errors := self._all(error):
            return errors
        shard.shards.refresh()
        return []

    @property
    def _who(self) -> str:
        return f"trainer rank {self._team.rank} on {socket.gethostname()}"

    def _all(self, error: str | None) -> list[str]:
        return [text for text in self._team.ranks.gather(error) if text is not None]

    def blind(self, folder: Path, *, writes: bool) -> list[str]:
        """Why members cannot work in a folder that rank 0 sees."""
        return self._all(self._blind(folder, writes=writes))

    def _blind(self, folder: Path, *, writes: bool) -> str | None:
        how, give_up = os.R_OK | os.X_OK | (os.W_OK if writes else 0), time.monotonic() + SEEN_S
        while not (seen := os.access(folder, how)) and time.monotonic() < give_up:
            time.sleep(0.1)
        if seen:
            return None
        lacks = "has no right to" if folder.is_dir() else "does not see"
        return f"{self._who} {lacks} {folder}; put run.root on a file system that all ranks share, at the same path"


def _files(
    shard: ZeroShard, steps: float, held: Mapping[str, Mapping[str, Tensor]], player: str, number: int, of: int
) -> dict[str, Callable[[], Mapping[str, Tensor]]]:
    """What one rank writes, by names of files. held: whole parameters of every kind."""
    buffers = shard.buffers if number == 0 else {}
    named = {f"{entry}/{name}": tensor for entry in MOMENTS for name, tensor in held.get(entry, {}).items()}
    if steps:
        named |= {f"step/{name}": torch.tensor(steps) for name in held["live"]}
    files: dict[str, Callable[[], Mapping[str, Tensor]]] = {
        numbered(f"{player}/model", number, of): lambda: as_stored(shard.model, {**held["live"], **buffers}),
        numbered(f"optimizer-{player}", number, of): lambda: named,
    }
    if "shadow" in held:
        average = lambda: as_stored(shard.model, {**held["shadow"], **buffers})  # noqa: E731
        files[numbered(f"{player}-ema/model", number, of)] = average
    if "previous" in held:
        files[numbered(f"previous-{player}", number, of)] = lambda: held["previous"]
    return files


def as_stored(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of whole layers, under the names and in the forms in which transformers stores this family."""
    ignored = model._keys_to_ignore_on_save or ()
    made = revert_weight_conversion(model, {name: t for name, t in tensors.items() if name not in ignored})
    return {name: own_storage(tensor) for name, tensor in made.items()}
