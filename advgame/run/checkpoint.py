"""Checkpoints of a run: both players, their EMAs and optimizers, saved as Hugging Face folders and loaded
exactly.

    checkpoints/step-000050/
      attacker/  attacker-ema/  defender/  defender-ema/     model.safetensors, config.json, tokenizer
      attacker-adapter/  attacker-ema-adapter/  ...          under learn.lora: what learns, as peft reads it
      optimizer-attacker.safetensors  optimizer-defender.safetensors
      previous-attacker.safetensors   ...                    the average before the last one, where pairs refer to it
      trees.jsonl.gz                                         played ahead and not yet learned from
      state.json                                             step, updates, options, checksums, config hash

Under learn.lora the model folders hold merged weights, for others to load; a run resumes from the adapters, on the base
model that it started from. Where several ranks hold a player, each writes some of its parameters, into files that are
numbered as transformers numbers them (model-00001-of-00002.safetensors and so on); who resumes reads the same from one
file or several. Nothing is pickled. How folders appear whole, are verified and pruned is in `checkpoint_files.py`, what
stands in a player's files in `player_files.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor

from advgame.errors import InputError
from advgame.game.tree import Tree
from advgame.learn.part_files import PartError, Written
from advgame.learn.stored import tensors_of
from advgame.rollout.chat import first_line
from advgame.run.checkpoint_files import (
    begin_hidden,
    checkpoint_problem,
    half_written,
    prune_checkpoints,
    publish_hidden,
    read_state,
)
from advgame.run.folder import RunFolder
from advgame.run.optimizer_state import check_optimizer
from advgame.run.player_files import join_parts, read_player, write_player
from advgame.run.recorder import read_trees, write_trees
from advgame.run.train_state import PlayerState, TrainState, parameters_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FORMAT, _READS = 2, (1, 2)
"""Of 1, every file of tensors was alone."""

TREES_FILE = "trees.jsonl.gz"

_CONFIG_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
"""Settings of a model that tell architectures apart where tensor shapes alone might agree."""


@dataclass(frozen=True)
class LoadedState:
    """What a checkpoint says besides tensors. `config_sha256` is that of the saving run's config.yaml."""

    step: int
    extra: Mapping[str, Any]
    updates: Mapping[str, int]
    config_sha256: str | None
    trees: Sequence[Tree] = ()


@dataclass(frozen=True)
class Begun:
    """A checkpoint that ranks are writing already. parts: by player, what waits for them and gives their files."""

    state: TrainState
    parts: Mapping[str, Callable[[], Mapping[str, Written]]]


def save_checkpoint(folder: RunFolder, state: TrainState, keep: int) -> Path:
    """Writes `checkpoints/step-<step>`, then deletes all but the `keep` newest.

    A half-written checkpoint is never visible, and nothing is deleted before the new one is. Raises
    CheckpointError (one line) when the disk is full or refuses; the earlier checkpoints are then intact.
    """
    return finish_checkpoint(folder, begin_checkpoint(folder, state, beside=False), keep)


def begin_checkpoint(folder: RunFolder, state: TrainState, *, beside: bool) -> Begun:
    """Has ranks that hold players copy, and write, what they hold; on the thread that makes all calls to them."""
    with half_written(folder.checkpoints, state.step) as hidden:
        begin_hidden(hidden)
        parts = {
            name: player.elsewhere.write(hidden, name, beside=beside)
            for name, player in state.players.items()
            if player.elsewhere is not None
        }
    return Begun(state, parts)


def finish_checkpoint(folder: RunFolder, begun: Begun, keep: int) -> Path:
    """The rest of `save_checkpoint`, on any thread."""
    state = begun.state
    with half_written(folder.checkpoints, state.step) as hidden:
        if keep < 1:
            raise InputError(f"checkpoints to keep: {keep}; must be at least 1")
        players, known = {}, dict[str, str]()
        for name, player in state.players.items():
            optimizer = write_player(hidden, name, player)
            if name in begun.parts:
                known |= join_parts(hidden, name, player, begun.parts[name]())
            players[name] = _described(player, optimizer)
        if state.trees:
            write_trees(hidden / TREES_FILE, [tree for tree, _ in state.trees], [reward for _, reward in state.trees])
        described = {
            "format": _FORMAT,
            "step": state.step,
            "extra": dict(state.extra),
            "config_sha256": _file_sha256(folder.config),
            "players": players,
        }
        path = publish_hidden(hidden, described, known)
    prune_checkpoints(folder.checkpoints, state.step, keep)
    return path


def load_into(path: Path, players: Mapping[str, PlayerState], *, verify: bool = True) -> LoadedState:
    """Copies a checkpoint, in place and bit for bit, into live parameters, shadows and optimizers.

    Optimizers may be fresh. Everything is compared before anything is written: InputError, one line, on a
    damaged checkpoint (`verify` off skips the checksums, for a path that `latest_checkpoint` just verified),
    on other player names, architectures, tensor names or shapes, on an EMA or optimizer that only one side
    has.
    """
    if verify and (problem := checkpoint_problem(path)) is not None:
        raise InputError(f"{path}: damaged ({problem}); use an earlier checkpoint")
    state = read_state(path)
    if state["format"] not in _READS:
        raise InputError(f"{path}: has checkpoint format {state['format']}; this version reads {_READS[-1]} and older")
    saved = state["players"]
    if set(saved) != set(players):
        raise InputError(f"{path}: {_other_players(set(saved), set(players))}")
    for name, player in players.items():
        _check_player(path, name, player, saved[name])
    file = path / TREES_FILE
    trees = [recorded.tree for recorded in read_trees(file)] if file.is_file() else []
    for name, player in players.items():
        try:
            read_player(path, name, player, saved[name]["optimizer"], played_ahead=bool(trees))
        except (OSError, SafetensorError, PartError) as error:
            raise InputError(f"{path}, player {name}: cannot be read ({first_line(error)})") from error
    updates = {name: saved[name]["updates"] for name in saved}
    return LoadedState(state["step"], state["extra"], updates, state["config_sha256"], trees)


def _other_players(saved: set[str], live: set[str]) -> str:
    """What differs, and the settings that decide it."""
    if "shared" in saved ^ live:
        mend = f"set game.self_play: {str('shared' in saved).lower()}"
    else:
        fields = [f"{name}.frozen" for name in sorted(saved ^ live)]
        mend = f"resume with the saved {' and '.join(fields)}"
        mend += " and game.skip_attacker" if "attacker" in saved ^ live else ""
    return f"holds players {sorted(saved)}, this run has {sorted(live)}; {mend}"


def _described(player: PlayerState, optimizer: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "updates": player.updates,
        "architecture": _architecture(player.model),
        "tensors": _kinds(tensors_of(player.model)),
        "ema": _kinds(player.shadow),
        "optimizer": optimizer,
    }


def _check_player(path: Path, name: str, player: PlayerState, saved: Mapping[str, Any]) -> None:
    where = f"{path}, player {name}"
    _compare(where, "", saved["architecture"], _architecture(player.model))
    _compare(where, "tensor ", saved["tensors"], _kinds(tensors_of(player.model)))
    _compare(where, "EMA of ", saved["ema"], _kinds(player.shadow))
    if (player.optimizer is None) != (saved["optimizer"] is None):
        has, lacks = ("this run", "the checkpoint") if saved["optimizer"] is None else ("the checkpoint", "this run")
        raise InputError(f"{where}: {has} has an optimizer, {lacks} has none; resume with the saved {name}.frozen")
    if player.optimizer is not None:
        check_optimizer(player.optimizer, parameters_of(player.model), saved["optimizer"], where)


def _compare(where: str, what: str, saved: Mapping[str, Any], live: Mapping[str, Any]) -> None:
    for key in [*saved, *(key for key in live if key not in saved)]:
        if saved.get(key) != live.get(key):
            a, b = ("absent" if value is None else value for value in (saved.get(key), live.get(key)))
            raise InputError(
                f"{where}: {what}{key} is {a} in the checkpoint, {b} in this run; resume with its settings"
            )


def _architecture(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config.to_dict()
    return {"architecture": type(model).__name__, **{key: config.get(key) for key in _CONFIG_KEYS}}


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> "float32[64, 8]"; a copy between different types would not be exact."""
    return {key: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for key, t in tensors.items()}


def _file_sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
