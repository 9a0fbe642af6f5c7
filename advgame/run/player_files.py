"""A player's files in a checkpoint: written from what is held here or beside what ranks write, and read in place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils import logging as transformers_logging

from advgame.errors import InputError
from advgame.learn import lora
from advgame.learn.part_files import Written, index, own_storage
from advgame.learn.stored import copy_model, copy_tensors, files_of, stored, tensors_of
from advgame.run.optimizer_state import Packed, pack_optimizer, unpack_optimizer
from advgame.run.train_state import PlayerState, parameters_of


def write_player(target: Path, name: str, player: PlayerState) -> Mapping[str, Any] | None:
    """Writes into a checkpoint's folder all of a player that no ranks write; returns its optimizer, described."""
    parameters = parameters_of(player.model)
    unknown = sorted(set(player.shadow) - set(parameters))
    if unknown:
        raise InputError(f"player {name}: the EMA holds {unknown[0]!r}, which is no parameter of the model")
    write = _write_around if player.elsewhere else _write_model if player.lora is None else _write_adapted
    write(target / name, player, None)
    if player.shadow:
        write(target / f"{name}-ema", player, player.shadow)
    if player.optimizer is None:
        return None
    packed = player.packed or Packed(*pack_optimizer(player.optimizer, parameters))
    if player.elsewhere is None:
        moments = {key: own_storage(tensor.cpu()) for key, tensor in packed.tensors.items()}
        save_file(moments, target / f"optimizer-{name}.safetensors")
        if player.previous:
            previous = {key: own_storage(tensor.cpu()) for key, tensor in player.previous.items()}
            save_file(previous, target / f"previous-{name}.safetensors")
    return packed.described


def join_parts(target: Path, name: str, player: PlayerState, files: Mapping[str, Written]) -> dict[str, str]:
    """Makes Hugging Face folders of what ranks have written of a player; returns the checksums of their files."""
    for folder in (name, f"{name}-ema"):
        own = {Path(file).name: one for file, one in files.items() if file.startswith(f"{folder}/")}
        if len(own) > 1:
            made = index(own, player.model.num_parameters())
            (target / folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    return {file: written.sha256 for file, written in files.items()}


@torch.no_grad()
def read_player(
    path: Path, name: str, player: PlayerState, optimizer: Mapping[str, Any] | None, *, played_ahead: bool
) -> None:
    """Fills a player in place from a checkpoint's folder, or has its ranks do so. optimizer: as it was described;
    played_ahead: whether there are trees that the average before the last one may have sampled."""
    previous = _previous_of(path, name, player, played_ahead)
    if player.elsewhere is not None:
        player.elsewhere.read(path, name, previous)
        return
    if player.lora is not None:
        lora.load_adapters(path / f"{name}-adapter", lora.live_adapters(player.model))
        if player.shadow:
            lora.load_adapters(path / f"{name}-ema-adapter", player.shadow)
    else:
        copy_model(path / name, player.model, tensors_of(player.model))
        if player.shadow:
            copy_model(path / f"{name}-ema", player.model, player.shadow)
    if previous is not None:
        for key, tensor in player.shadow.items():
            player.previous.setdefault(key, torch.empty_like(tensor)).copy_(tensor)
        if previous != f"{name}-ema":
            copy_tensors(files_of(path, previous), player.previous)
    if player.optimizer is not None and optimizer is not None:
        moments = dict(stored(files_of(path, f"optimizer-{name}")))
        unpack_optimizer(player.optimizer, parameters_of(player.model), moments, optimizer)


def _previous_of(path: Path, name: str, player: PlayerState, played_ahead: bool) -> str | None:
    """Which stem's files the average before the last one comes from, if there shall be one.

    It sampled what was played ahead, and only that: `run.ahead` may have changed, or the run may have been at its end.
    What comes first otherwise will be sampled from the saved average itself.
    """
    stem = f"previous-{name}"
    if played_ahead and (player.previous or player.recomputes) and any(path.glob(f"{stem}*.safetensors")):
        return stem
    return f"{name}-ema" if player.previous else None


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


def _write_around(folder: Path, player: PlayerState, _: Mapping[str, Tensor] | None) -> None:
    """What stands beside the weights in such a folder. Not by save_pretrained, which deletes the ranks' files."""
    folder.mkdir(exist_ok=True)
    model = player.model
    model.config.dtype, model.config.architectures = "float32", [type(model).__name__]
    if model.is_remote_code():
        custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
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
