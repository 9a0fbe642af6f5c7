"""Trackers: TensorBoard files that resume cleanly, and Weights & Biases only on request."""

import math
import sys
import types

import pytest

from advgame.errors import InputError
from advgame.run.folder import RunFolder
from advgame.run.trackers import make_trackers


@pytest.fixture
def folder(tmp_path):
    with RunFolder.create(tmp_path, "run", "", purpose="a test") as folder:
        yield folder


def test_tensorboard_purges_what_is_played_again(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, value, purge in (((0, 1, 2, 3), 1.0, None), ((2, 3), 5.0, 2)):
        (tracker,) = make_trackers(folder, tensorboard=True, purge_step=purge)
        for step in steps:
            tracker.log(step, {"a/b": value, "broken": math.nan})
        tracker.close()
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    assert events.Tags()["scalars"] == ["a/b"]
    assert [(e.step, e.value) for e in events.Scalars("a/b")] == [(0, 1.0), (1, 1.0), (2, 5.0), (3, 5.0)]


def test_nothing_asked_nothing_made(folder):
    assert make_trackers(folder, tensorboard=False) == []
    assert list(folder.tensorboard.iterdir()) == []


def test_missing_wandb_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"advgame\[wandb\]"):
        make_trackers(folder, tensorboard=True, wandb=True)
    assert list(folder.tensorboard.iterdir()) == []


def test_wandb_gets_no_entity_and_no_mode(folder, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

    def init(**options):
        calls.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    (tracker,) = make_trackers(folder, tensorboard=False, wandb=True, project="p", config={"a": 1})
    tracker.log(3, {"x": 1.0, "y": math.inf})
    tracker.close()
    options, *rest = calls
    assert options["group"] == options["name"] == "run"
    assert options["config"] == {"a": 1}
    assert not {"entity", "mode"} & set(options)
    assert rest == [(3, {"x": 1.0}), "finish"]
