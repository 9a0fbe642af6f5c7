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
model that it started from. Nothing is pickled. How folders appear whole, are verified and pruned is in
`checkpoint_files.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from advgame.errors import InputError
from advgame.game.tree import Tree
from advgame.learn import lora
from advgame.rollout.chat import first_line
from advgame.run.checkpoint_files import checkpoint_problem, prune_checkpoints, read_state, writing_checkpoint
from advgame.run.folder import RunFolder
from advgame.run.optimizer_state import Packed, check_optimizer, pack_optimizer, unpack_optimizer
from advgame.run.recorder import read_trees, write_trees
from advgame.run.train_state import PlayerState, TrainState, parameters_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FORMAT = 1

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


def save_checkpoint(folder: RunFolder, state: TrainState, keep: int) -> Path:
    """Writes `checkpoints/step-<step>`, then deletes all but the `keep` newest.

    A half-written checkpoint is never visible, and nothing is deleted before the new one is. Raises
    CheckpointError (one line) when the disk is full or refuses; the earlier checkpoints are then intact.
    """
    if keep < 1:
        raise InputError(f"checkpoints to keep: {keep}; must be at least 1")
    described: dict[str, Any] = {
        "format": _FORMAT,
        "step": state.step,
        "extra": dict(state.extra),
        "config_sha256": _file_sha256(folder.config),
        "players": {},
    }
    with writing_checkpoint(folder.checkpoints, state.step, described) as target:
        for name, player in state.players.items():
            described["players"][name] = _write_player(target, name, player)
        if state.trees:
            write_trees(target / TREES_FILE, [tree for tree, _ in state.trees], [reward for _, reward in state.trees])
    prune_checkpoints(folder.checkpoints, state.step, keep)
    return folder.checkpoints / f"step-{state.step:06d}"


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
    if state["format"] != _FORMAT:
        raise InputError(f"{path}: has checkpoint format {state['format']}; this version reads {_FORMAT}")
    saved = state["players"]
    if set(saved) != set(players):
        raise InputError(f"{path}: {_other_players(set(saved), set(players))}")
    for name, player in players.items():
        _check_player(path, name, player, saved[name])
    for name, player in players.items():
        try:
            _read_player(path, name, player, saved[name])
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}, player {name}: cannot be read ({first_line(error)})") from error
    return LoadedState(
        state["step"],
        state["extra"],
        {name: saved[name]["updates"] for name in saved},
        state["config_sha256"],
        [recorded.tree for recorded in read_trees(path / TREES_FILE)] if (path / TREES_FILE).is_file() else [],
    )


def _other_players(saved: set[str], live: set[str]) -> str:
    """What differs, and the settings that decide it."""
    if "shared" in saved ^ live:
        mend = f"set game.self_play: {str('shared' in saved).lower()}"
    else:
        fields = [f"{name}.frozen" for name in sorted(saved ^ live)]
        mend = f"resume with the saved {' and '.join(fields)}"
        mend += " and game.skip_attacker" if "attacker" in saved ^ live else ""
    return f"holds players {sorted(saved)}, this run has {sorted(live)}; {mend}"


def _write_player(target: Path, name: str, player: PlayerState) -> dict[str, Any]:
    parameters = parameters_of(player.model)
    unknown = sorted(set(player.shadow) - set(parameters))
    if unknown:
        raise InputError(f"player {name}: the EMA holds {unknown[0]!r}, which is no parameter of the model")
    write = _write_model if player.lora is None else _write_adapted
    write(target / name, player, None)
    if player.shadow:
        write(target / f"{name}-ema", player, player.shadow)
    optimizer: Mapping[str, Any] | None = None
    if player.optimizer is not None:
        packed = player.packed or Packed(*pack_optimizer(player.optimizer, parameters))
        optimizer = packed.described
        save_file(
            {key: _own_storage(tensor.cpu()) for key, tensor in packed.tensors.items()},
            target / f"optimizer-{name}.safetensors",
        )
    if player.previous:
        previous = {key: _own_storage(tensor.cpu()) for key, tensor in player.previous.items()}
        save_file(previous, target / f"previous-{name}.safetensors")
    return {
        "updates": player.updates,
        "architecture": _architecture(player.model),
        "tensors": _kinds(_tensors(player.model)),
        "ema": _kinds(player.shadow),
        "optimizer": optimizer,
    }


def _write_model(folder: Path, player: PlayerState, shadow: Mapping[str, Tensor] | None) -> None:
    """The model as `from_pretrained` reads it; with `shadow`, its tensors in the parameters' places."""
    state = player.model.state_dict(keep_vars=True)
    if shadow is not None:
        # Tied weights appear under several names and once in the shadow: go by the parameter, not by the
        # name.
        replaced = {id(p): shadow[name] for name, p in parameters_of(player.model).items() if name in shadow}
        state = {name: replaced.get(id(tensor), tensor) for name, tensor in state.items()}
    state = {name: player.values.get(id(tensor), tensor) for name, tensor in state.items()}
    with _no_progress_bars():
        player.model.save_pretrained(folder, state_dict={name: tensor.detach() for name, tensor in state.items()})
    player.tokenizer.save_pretrained(folder)


def _write_adapted(folder: Path, player: PlayerState, shadow: Mapping[str, Tensor] | None) -> None:
    """The merged model as `from_pretrained` reads it, and beside it the adapters as peft does."""
    assert player.lora is not None
    adapters = lora.live_adapters(player.model) if shadow is None else shadow
    buffers = {n: b for n, b in player.model.state_dict().items() if n in dict(player.model.named_buffers())}
    with _no_progress_bars():
        player.model.save_pretrained(folder, state_dict=dict(lora.merged(player.model, adapters)) | buffers)
    player.tokenizer.save_pretrained(folder)
    lora.save_adapters(folder.with_name(f"{folder.name}-adapter"), adapters, player.lora)


def _check_player(path: Path, name: str, player: PlayerState, saved: Mapping[str, Any]) -> None:
    where = f"{path}, player {name}"
    _compare(where, "", saved["architecture"], _architecture(player.model))
    _compare(where, "tensor ", saved["tensors"], _kinds(_tensors(player.model)))
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


@torch.no_grad()
def _read_player(path: Path, name: str, player: PlayerState, saved: Mapping[str, Any]) -> None:
    if player.lora is not None:
        lora.load_adapters(path / f"{name}-adapter", lora.live_adapters(player.model))
        if player.shadow:
            lora.load_adapters(path / f"{name}-ema-adapter", player.shadow)
    else:
        _copy_model(path / name, player.model, _tensors(player.model))
        if player.shadow:
            _copy_model(path / f"{name}-ema", player.model, player.shadow)
    if player.previous:
        # without one nothing was played ahead: what comes first will be sampled from the saved average itself
        file = path / f"previous-{name}.safetensors"
        stored = load_file(file) if file.is_file() else player.shadow
        for key, tensor in player.previous.items():
            tensor.copy_(stored[key])
    if player.optimizer is not None:
        tensors = load_file(path / f"optimizer-{name}.safetensors")
        unpack_optimizer(player.optimizer, parameters_of(player.model), tensors, saved["optimizer"])


def _copy_model(folder: Path, model: PreTrainedModel, into: Mapping[str, Tensor]) -> None:
    """Fills `into` (by the model's own tensor names) from a Hugging Face folder, one tensor at a time."""
    missing = dict(into)
    # Tied weights are stored once, under any of their names.
    names: dict[int, set[str]] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), set()).add(key)
    canonical = {key: own for own, tensor in _tensors(model).items() for key in names[id(tensor)]}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                own = canonical.get(key)
                if own in missing:
                    missing.pop(own).copy_(stored.get_tensor(key))
    if missing:
        # Families that transformers stores under other names than it trains (fused experts): let it convert.
        loaded = _tensors(type(model).from_pretrained(folder, dtype=torch.float32, use_safetensors=True))
        for key, tensor in missing.items():
            tensor.copy_(loaded[key])


def _architecture(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config.to_dict()
    return {"architecture": type(model).__name__, **{key: config.get(key) for key in _CONFIG_KEYS}}


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> "float32[64, 8]"; a copy between different types would not be exact."""
    return {key: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for key, t in tensors.items()}


def _own_storage(tensor: Tensor) -> Tensor:
    """`tensor`, copied only if it is a view: safetensors refuses those, and copies are dear at 7B."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that is saved: parameters and persistent buffers, tied ones once."""
    found: dict[int, tuple[str, Tensor]] = {}
    named: dict[str, Tensor] = {**parameters_of(model), **model.state_dict(keep_vars=True)}
    for name, tensor in named.items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """save_pretrained draws a bar per model, which would tear the live view."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _file_sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
