"""The recorder: exact round trips, null for NaN, rewinding without loss."""

import gzip
import json
import math

import pytest
import tree_samples as make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from advgame.errors import InputError
from advgame.game.rewards import TreeRewards
from advgame.run.folder import RunFolder
from advgame.run.recorder import Recorder, read_metrics, read_trees, tree_files
from advgame.run.tree_codec import decode_tree, encode_tree


@pytest.fixture
def folder(tmp_path):
    with RunFolder.create(tmp_path, "run", "", purpose="a test") as folder:
        yield folder


@pytest.fixture
def resume(folder):
    folder.close()
    opened = []

    def again():
        for old in opened:
            old.close()
        opened.append(RunFolder.resume(folder.path))
        return opened[-1]

    yield again
    for old in opened:
        old.close()


NO_REWARDS = TreeRewards((), ())


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(make.rewarded_trees(), max_size=3))
def test_round_trip_is_exact(tmp_path_factory, pairs):
    with RunFolder.create(tmp_path_factory.mktemp("runs"), "run", "", purpose="x") as folder:
        path = Recorder(folder).trees(7, [tree for tree, _ in pairs], [rewards for _, rewards in pairs])
        back = [(recorded.tree, recorded.rewards) for recorded in read_trees(path)]
    assert back == pairs
    assert repr(back) == repr(pairs)  # the signs of zeros and the types of numbers too


def test_nan_logprob_survives():
    tree = make.tree(attacks=[make.attack(logprobs=(math.nan, -math.inf))])
    line = json.dumps(encode_tree(tree, TreeRewards((None,), ((),))), allow_nan=False)
    (attack,) = decode_tree(json.loads(line)).tree.attacks
    assert math.isnan(attack.sample.logprobs[0])
    assert attack.sample.logprobs[1] == -math.inf


def test_tree_file_is_whole_equal_bytes_and_never_overwritten(folder):
    recorder = Recorder(folder)
    first = recorder.trees(0, [make.tree()], [NO_REWARDS]).read_bytes()
    assert recorder.trees(1, [make.tree()], [NO_REWARDS]).read_bytes() == first
    with pytest.raises(InputError, match="recorded already"):
        recorder.trees(1, [], [])
    with pytest.raises(ValueError, match="zip"):
        recorder.trees(2, [make.tree()], [])
    assert [path.name for path in tree_files(folder.trees)] == ["000000.jsonl.gz", "000001.jsonl.gz"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (gzip.compress(b'{"format": 2}\n', mtime=0), "line 1: field 'format'"),
        (gzip.compress(b'{"format": 1}\n', mtime=0), "line 1: field 'seed' is missing"),
        (gzip.compress(b"[]\n", mtime=0), "line 1: not a recorded tree"),
        (gzip.compress(b"{", mtime=0), "line 1: Expecting"),
        (gzip.compress(b'{"format": 1}\n' * 9, mtime=0)[:-12], "cannot be read|line 1"),
        (b"plain", "cannot be read"),
    ],
)
def test_damaged_trees_are_named(tmp_path, content, problem):
    path = tmp_path / "000000.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=problem) as caught:
        list(read_trees(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_metrics_rows(folder):
    recorder = Recorder(folder)
    recorder.metrics(0, {"a": 0.1, "b": math.nan, "c": -math.inf})
    assert recorder.counters["metrics_non_finite"] == 2
    recorder.metrics(1, {"a": 1 / 3})
    first, second = read_metrics(folder.metrics)  # flushed: readable while the recorder is open
    assert (first["a"], first["b"], first["c"], first["non_finite"], first["attempt"]) == (0.1, None, None, 2, 0)
    assert second["a"] == 1 / 3
    assert "non_finite" not in second
    with pytest.raises(InputError, match="'step'"):
        recorder.metrics(2, {"step": 1.0})


def test_torn_line_of_a_killed_process_is_set_aside(folder):
    folder.metrics.write_text('{"step": 0}\n{"step": 1, "a"')
    assert read_metrics(folder.metrics) == [{"step": 0}]
    recorder = Recorder(folder)
    recorder.metrics(1, {})
    assert [row["step"] for row in read_metrics(folder.metrics)] == [0, 1]
    assert recorder.counters["metrics_torn"] == 1
    assert (folder.path / "metrics.torn.txt").read_text() == '{"step": 1, "a"\n'


def test_rewind_loses_nothing_and_counts_nothing_twice(folder, resume):
    def play(recorder, steps):
        for step in steps:
            recorder.metrics(step, {"a": 1.0})
            recorder.trees(step, [make.tree(step=step)], [NO_REWARDS])

    with Recorder(folder) as recorder:
        play(recorder, range(5))
    for start, stop in ((3, 6), (2, 4)):
        with Recorder(resume()) as recorder:
            recorder.rewind(start)
            play(recorder, range(start, stop))

    def rows(name):
        return [(row["step"], row["attempt"]) for row in read_metrics(folder.path / name)]

    assert rows("metrics.jsonl") == [(0, 0), (1, 0), (2, 2), (3, 2)]
    assert rows("metrics.attempt0.jsonl") == [(3, 0), (4, 0)]
    assert rows("metrics.attempt1.jsonl") == [(2, 0), (3, 1), (4, 1), (5, 1)]
    assert [int(path.name[:6]) for path in tree_files(folder.trees)] == [0, 1, 2, 3]
    assert len(list(folder.trees.iterdir())) == 5 + 3 + 2
    assert (folder.trees / "000004.attempt0.jsonl.gz").exists()
    assert (folder.trees / "000004.attempt1.jsonl.gz").exists()


def test_second_rewind_of_one_attempt_overwrites_nothing(folder, resume):
    with Recorder(resume()) as recorder:
        for _ in range(3):
            recorder.rewind(0)
            recorder.metrics(0, {})
            recorder.trees(0, [], [])
    assert len(list(folder.trees.iterdir())) == 3
    assert len(list(folder.path.glob("metrics*.jsonl"))) == 3
