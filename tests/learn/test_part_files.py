"""Files that several ranks write of one player: who writes what, how it is known, and read by other spans."""

import json
import threading
from collections import Counter
from math import prod

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from advgame.errors import RanksDied
from advgame.learn import part_files
from advgame.learn.layout import Layout
from advgame.learn.part_files import PartError, await_parts, divide, index, note_name, numbered, sha256_of, write_part
from advgame.learn.stored import copy_tensors, files_of

LAYER = {"up": (16, 8), "down": (8, 16), "norm": (8,)}
LAYERS = {f"layers.{i}.{part}": shape for i in range(6) for part, shape in LAYER.items()}
LAYERS = {"embed": (64, 8), **LAYERS, "norm": (8,), "head": (64, 8)}
PLAYER = {name: torch.arange(prod(shape), dtype=torch.float32).reshape(shape) + i for i, (name, shape) in
          enumerate(LAYERS.items())}  # fmt: skip


@pytest.mark.parametrize("writers", [1, 2, 3, 7, 40])
def test_parameters_are_divided_whole_by_layers_and_evenly(writers):
    parts = divide(LAYERS, writers)
    assert [name for part in parts for name in part] == list(LAYERS)
    assert len(parts) == writers
    where = {name: i for i, part in enumerate(parts) for name in part}
    assert all(len({where[f"layers.{i}.{part}"] for part in LAYER}) == 1 for i in range(6))
    total, largest = sum(map(prod, LAYERS.values())), 64 * 8
    assert max(sum(prod(LAYERS[name]) for name in part) for part in parts) <= total / writers + largest


def test_ranks_that_hold_runs_of_all_elements_write_what_lies_there():
    """As at ZeRO 1 and 2: what travels is less than a layer at every border."""
    total, writers = sum(map(prod, LAYERS.values())), 4
    start, moved = 0, Counter()
    for name, writer in ((n, i) for i, part in enumerate(divide(LAYERS, writers)) for n in part):
        for element in range(start, start + prod(LAYERS[name])):
            moved[element * writers // total != writer] += 1
        start += prod(LAYERS[name])
    assert moved[True] < (writers - 1) * 64 * 8
    assert moved[True] < 0.25 * total


def written(folder, writers, tensors=PLAYER):
    """Notes of a player that so many wrote, all in turn."""
    parts = [part for part in divide(LAYERS, writers) if part]
    notes = {}
    for i, part in enumerate(parts):
        note = note_name("p", i, len(parts))
        file = numbered("p/model", i, len(parts))
        write_part(folder, note, {file: lambda part=part: {name: tensors[name] for name in part}}, f"rank {i}")
        notes[note] = i
    return notes


def spans(ranks):
    """Of runs of all elements in order, as ZeRO 1 and 2 cut; and of every parameter apart, as ZeRO 3 does."""
    total = sum(map(prod, LAYERS.values()))
    size = -(-total // ranks)
    for rank in range(ranks):
        first, runs = 0, {}
        for name, shape in LAYERS.items():
            n = prod(shape)
            start = min(max(rank * size - first, 0), n)
            runs[name] = (start, min(max((rank + 1) * size - first, 0), n) - start)
            first += n
        yield runs
    for rank in range(ranks):
        cut = {}
        for name, shape in LAYERS.items():
            held = -(-prod(shape) // ranks)
            start = min(rank * held, prod(shape))
            cut[name] = (start, min(held, prod(shape) - start))
        yield cut


@pytest.mark.parametrize("writers", [1, 2, 5])
@pytest.mark.parametrize("readers", [1, 3, 600])
def test_what_some_ranks_wrote_others_read_by_spans(tmp_path, writers, readers):
    await_parts(tmp_path, written(tmp_path, writers), lambda: None)
    files = files_of(tmp_path / "p", "model")
    assert len(files) == writers
    empty = 0
    for one in [*spans(readers)][:: max(1, readers // 4)]:
        pieces = {name: torch.full((length,), -1.0) for name, (_, length) in one.items()}
        copy_tensors(files, pieces, one)
        for name, (start, length) in one.items():
            assert torch.equal(pieces[name], PLAYER[name].view(-1)[start : start + length])
            empty += not length
    assert (empty > 0) == (readers > 1)


def test_notes_say_what_is_there_and_nothing_else_stays(tmp_path):
    files = await_parts(tmp_path, written(tmp_path, 2), lambda: None)
    assert [*files] == ["p/model-00001-of-00002.safetensors", "p/model-00002-of-00002.safetensors"]
    assert {p.name for p in tmp_path.iterdir()} == {"p"}
    for name, one in files.items():
        assert one.sha256 == sha256_of(tmp_path / name)
        assert one.size == (tmp_path / name).stat().st_size
    made = index(files, 7)
    assert made["metadata"] == {"total_parameters": 7, "total_size": 4 * sum(map(prod, LAYERS.values()))}
    assert made["weight_map"].keys() == LAYERS.keys()


def test_files_that_are_missing_damaged_or_short_are_named(tmp_path):
    await_parts(tmp_path, written(tmp_path, 2), lambda: None)
    folder = tmp_path / "p"
    second = folder / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    into = {name: torch.zeros(shape) for name, shape in LAYERS.items()}
    for data in (whole[:-8], whole[:4], b"no header at all", b""):
        second.write_bytes(data)
        with pytest.raises(SafetensorError, match=r"model-00002-of-00002\.safetensors: ") as error:
            copy_tensors(files_of(folder, "model"), into)
        assert "\n" not in str(error.value)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002\.safetensors is missing"):
        files_of(folder, "model")
    with pytest.raises(FileNotFoundError, match=r"^nothing\.safetensors is missing"):
        files_of(folder, "nothing")
    save_file({"embed": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(SafetensorError, match=r"a tensor is of shape \[3\], not \[64, 8\]"):
        copy_tensors(files_of(folder, "model"), into)
    with pytest.raises(SafetensorError, match=r"a tensor is of shape \[2\], not \[5\]"):
        copy_tensors(files_of(folder, "model"), {"embed": torch.zeros(5)}, {"embed": (1, 5)})
    with pytest.raises(SafetensorError, match="head is missing"):
        copy_tensors(files_of(folder, "model"), {"head": torch.zeros(64, 8)})


def test_a_rank_that_cannot_write_says_so_and_leaves_room(tmp_path, monkeypatch):
    real = part_files.save_file

    def full(tensors, path, **how):
        if "optimizer" in path.name:
            path.write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        real(tensors, path, **how)

    monkeypatch.setattr(part_files, "save_file", full)
    files = {"p/model.safetensors": lambda: PLAYER, "optimizer-p.safetensors": lambda: PLAYER}
    write_part(tmp_path, "part-p.json", files, "trainer rank 3 on node7")
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".safetensors"]
    with pytest.raises(PartError, match=r"^trainer rank 3 on node7: No space left on device$"):
        await_parts(tmp_path, {"part-p.json": 3}, lambda: None)


def test_a_file_that_rank_0_sees_shorter_is_refused(tmp_path):
    notes = written(tmp_path, 1)
    told = json.loads((tmp_path / "part-p.json").read_text())
    told["files"]["p/model.safetensors"]["size"] += 1
    (tmp_path / "part-p.json").write_text(json.dumps(told))
    with pytest.raises(PartError, match=r"^p/model\.safetensors has \d+ bytes, its rank wrote \d+$"):
        await_parts(tmp_path, notes, lambda: None)


def test_waiting_ends_with_a_rank_that_died_or_fell_silent(tmp_path, monkeypatch):
    asked = []

    def alive():
        asked.append(1)
        if len(asked) == 3:
            raise RanksDied("trainer rank 2 died")

    with pytest.raises(RanksDied, match="trainer rank 2 died"):
        await_parts(tmp_path, {"part-p.json": 2}, alive)
    monkeypatch.setattr(part_files, "SILENT_S", 0.3)
    growing = tmp_path / "growing"

    def grow(turns=[]):  # noqa: B006
        turns.append(1)
        if len(turns) < 10:
            growing.write_bytes(b"x" * len(turns))
            threading.Event().wait(0.05)

    with pytest.raises(PartError, match=r"trainer rank 2 has written nothing for 0\.3 s"):
        await_parts(tmp_path, {"part-p.json": 2}, grow)
    assert growing.stat().st_size == 9


def test_who_writes_is_known_everywhere():
    layout = Layout(LAYERS, (3, 4, 5), ({}, {}, {}), replicated=False)
    assert [rank for rank, _ in layout.writers] == [3, 4, 5]
    one = Layout({"a": (4, 4), "b": (1,)}, (1, 2, 3), ({}, {}, {}), replicated=False)
    assert one.writers == [(2, ["a"]), (3, ["b"])]
