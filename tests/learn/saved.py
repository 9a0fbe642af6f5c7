"""A learner's checkpoint, for tests: saved as a run saves it, and read into another learner."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from advgame.game.rewards import TreeRewards
from advgame.game.tree import Category, Seed, Tree
from advgame.learn.learner import Learner
from advgame.run.checkpoint import LoadedState, load_into
from advgame.run.loop import state_of
from advgame.run.saver import Saver
from advgame.run.train_state import TrainState

AHEAD = (Tree(Seed("s0", Category.HARMFUL, "a seed"), 1, 0, (), (), ()), TreeRewards((), ()))
"""Played ahead: it makes a resume take the average before the last one."""


def state(learner, step=1):
    return TrainState(step, {"player": state_of(learner, learner.whole())}, {}, [AHEAD])


def folder_of(checkpoints: Path) -> SimpleNamespace:
    """A run's folder, as far as checkpoints go."""
    return SimpleNamespace(checkpoints=checkpoints, config=checkpoints / "config.yaml")


def save(learner, folder: Path, step=1) -> Path:
    saver = Saver(folder_of(folder), 9, beside=True)
    saver.save(state(learner, step))
    saver.wait()
    saver.close()
    return folder / f"step-{step:06d}"


def load(path: Path, learner, *, verify=True) -> LoadedState:
    whole = learner.whole()
    loaded = load_into(path, {"player": state_of(learner, whole)}, verify=verify)
    learner.updates = loaded.updates["player"]
    learner.take(whole)
    return loaded


def plain_of(path: Path, learner, source: Path) -> Learner:
    """What a plain learner of `learner`'s settings, and of the same folder, reads from its checkpoint."""
    how = {"ema": learner.averaged, "ahead": learner._ahead, "lr": learner.base_lr}
    made = Learner(source, learner.tokenizer, learner.settings, field="defender.model", **how)
    load(path, made)
    return made


def tensors_of(plain: Learner) -> dict[str, torch.Tensor]:
    """Everything that a plain learner learns with, copied, by kind and name."""
    kinds = {"live": plain.live, "shadow": plain.shadow, "previous": plain.previous}
    found = {f"{kind} {name}": t.clone() for kind, tensors in kinds.items() for name, t in tensors.items()}
    for name, parameter in plain.parameters.items():
        for entry, value in plain.optimizer.state[parameter].items():
            found[f"{entry} {name}"] = torch.as_tensor(value).clone()
    return found
