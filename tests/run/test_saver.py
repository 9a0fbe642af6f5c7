"""Checkpoints beside the run: what is written is what was, whatever has been learned since; failures are heard."""

import threading
from dataclasses import replace

import pytest
import torch
from players import assert_same, model_of, player_of, tensors_of, train

from advgame.run import player_files
from advgame.run.checkpoint import load_into
from advgame.run.checkpoint_files import CheckpointError, latest_checkpoint
from advgame.run.saver import Saver
from advgame.run.train_state import TrainState, frozen


def state_of(player, step, **extra):
    return TrainState(step, {"defender": player}, extra)


def loaded(folder, **model):
    found = player_of(model=model_of(**model, seed=9), steps=0)
    return found, load_into(latest_checkpoint(folder.checkpoints).path, {"defender": found})


class Held:
    """save_file, as slow as the test wants."""

    def __init__(self, monkeypatch):
        self.real, self.begun, self.go = player_files.save_file, threading.Event(), threading.Event()
        monkeypatch.setattr(player_files, "save_file", self)

    def __call__(self, *arguments):
        self.begun.set()
        assert self.go.wait(30)
        self.real(*arguments)


@pytest.mark.parametrize("family", [0, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_learning_goes_on_while_a_checkpoint_is_written(folder, monkeypatch, family, tied):
    player, extra = player_of(model=model_of(family, tied)), {"counters": {"a": 1}}
    before = {name: tensor.clone() for name, tensor in tensors_of(player).items()}
    held, saver = Held(monkeypatch), Saver(folder, 2, beside=True)
    saver.save(state_of(player, 50, **extra))
    assert held.begun.wait(30)
    saver.check()  # under way: nothing to say
    train(player, seed=2)
    extra["counters"]["a"] = 2
    assert latest_checkpoint(folder.checkpoints).path is None, "half a checkpoint is visible"
    held.go.set()
    saver.wait()
    found, what = loaded(folder, family=family, tied=tied)
    assert_same(tensors_of(found), before)
    assert what.extra == {"counters": {"a": 1}}
    train(found, seed=2)
    assert_same(tensors_of(found), tensors_of(player))  # the next update agrees to the bit
    saver.close()


def test_the_next_checkpoint_waits_for_the_one_before(folder, monkeypatch):
    player, held, saver = player_of(), Held(monkeypatch), Saver(folder, 2, beside=True)
    saver.save(state_of(player, 50))
    second = threading.Thread(target=saver.save, args=(state_of(player, 100),))
    second.start()
    assert held.begun.wait(30)
    assert second.is_alive()
    held.go.set()
    second.join(30)
    saver.close()
    assert [p.name for p in sorted(folder.checkpoints.iterdir())] == ["step-000050", "step-000100"]


@pytest.mark.parametrize("heard", ["check", "wait", "save"])
def test_a_full_disk_is_heard_of_and_leaves_the_last_checkpoint(folder, monkeypatch, heard):
    player, saver = player_of(), Saver(folder, 2, beside=True)
    saver.save(state_of(player, 50))
    saver.wait()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(player_files, "save_file", full)
    saver.save(state_of(player, 100))
    if heard == "check":
        saver._thread.submit(int).result()  # whatever was under way has ended
    with pytest.raises(CheckpointError, match="No space left on device"):
        saver.save(state_of(player, 150)) if heard == "save" else getattr(saver, heard)()
    saver.close()
    assert [p.name for p in folder.checkpoints.iterdir()] == ["step-000050"]
    assert latest_checkpoint(folder.checkpoints).path is not None


def test_in_turn_nothing_is_copied(folder, monkeypatch):
    monkeypatch.setattr("advgame.run.saver.frozen", None)
    saver = Saver(folder, 2, beside=False)
    saver.save(state_of(player_of(), 50))
    assert latest_checkpoint(folder.checkpoints).path.name == "step-000050"
    saver.close()


def test_what_ranks_hold_is_not_copied_here():
    player = player_of()
    assert frozen(state_of(player, 1)).players["defender"] is not player
    away = replace(player, elsewhere=object())
    assert frozen(state_of(away, 1)).players["defender"] is away
    held = frozen(state_of(player, 1)).players["defender"]
    assert not {t.data_ptr() for t in held.shadow.values()} & {t.data_ptr() for t in player.shadow.values()}
    assert all(torch.equal(held.shadow[name], tensor) for name, tensor in player.shadow.items())
