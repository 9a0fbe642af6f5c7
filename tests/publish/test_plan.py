"""Copy plans: recorded from a loader that fuses, slices, pads and ties; hashed, diffed, refused with reasons."""

import json
from math import prod

import pytest
import torch
from torch import nn

from advgame.publish import host
from advgame.publish.arena import Arena, mapped
from advgame.publish.cover import cover
from advgame.publish.destinations import Destinations
from advgame.publish.plan import Plan, Region, Source, source_problems
from advgame.publish.record import PlanRefused, reasons_against, record

ROWS, WIDE, VOCAB = 4, 6, 5
NEEDS_HOST = pytest.mark.skipif(host.missing() is not None, reason="no extension")


class Fused(nn.Module):
    """Loads like an engine: q, k, v into one matrix, a column slice of `down`, a padded embedding, a tied head."""

    def __init__(self, rank=0, world=1, spoil=None):
        super().__init__()
        self.rank, self.world, self.spoil = rank, world, spoil
        self.qkv = nn.Parameter(torch.zeros(3 * ROWS // world, WIDE))
        self.down = nn.Parameter(torch.zeros(WIDE, ROWS // world))
        self.embed = nn.Parameter(torch.zeros(8, WIDE))
        self.head = self.embed
        self.norm = nn.Parameter(torch.zeros(WIDE))

    def load_weights(self, weights):
        for name, tensor in weights:
            if name in "qkv":
                part = ROWS // self.world
                place = self.qkv.data.narrow(0, "qkv".index(name) * part, part)
                place.copy_(tensor.narrow(0, self.rank * part, part))
            elif name == "down":
                self.down.data.copy_(tensor.chunk(self.world, 1)[self.rank])
            elif name == "embed":
                self.embed[: tensor.shape[0]].data.copy_(tensor)
                self.embed[tensor.shape[0] :].data.fill_(0)
            elif name == "norm":
                if self.spoil == "computed":
                    tensor = tensor + 1
                if self.spoil == "added":
                    self.norm.data.add_(tensor)
                elif self.spoil != "forgotten":
                    self.norm.data.copy_(tensor)
                if self.spoil == "twice":
                    self.norm.data.copy_(tensor)
            else:
                raise KeyError(name)


SOURCES = [Source(n, (ROWS, WIDE)) for n in "qkv"]
SOURCES += [Source("down", (WIDE, ROWS)), Source("embed", (VOCAB, WIDE)), Source("norm", (WIDE,))]


def plan_of(rank=0, world=1, sources=SOURCES, device="cpu", **kwargs):
    with torch.device(device):
        model = Fused(rank, world, **kwargs)
    return record(model, sources, name="fused", dtype=torch.float32, rank=rank, world_size=world)


def test_recording_reads_and_writes_nothing_and_needs_no_memory():
    model = Fused()
    plan = record(model, SOURCES, name="fused", dtype=torch.float32)
    assert all(not p.any() for p in model.parameters())
    assert plan == plan_of(device="meta")


def test_a_plan_survives_json_and_prints():
    plan = plan_of()
    again = Plan.from_tree(json.loads(json.dumps(plan.to_tree())))
    assert again == plan
    assert again.hash == plan.hash
    lines = plan.lines()
    assert plan.hash in lines[0]
    assert "copy k -> qkv [24: 4x6]" in lines
    assert "fill embed [30: 3x6] = 0" in lines
    assert "storage embed float32 48 (also head)" in lines


def test_plans_differ_where_the_layout_does():
    one, other = plan_of(), plan_of(0, 2)
    assert one.hash != other.hash
    assert one.diff(one) == []
    lines = one.diff(other)
    assert "world_size: 1 != 2" in lines
    assert "- copy v -> qkv [48: 4x6]" in lines
    assert "+ copy v [0: 2x6] -> qkv [24: 2x6]" in lines


@NEEDS_HOST
@pytest.mark.parametrize("world", [1, 2])
def test_what_is_written_is_what_the_loader_would_have_loaded(world):
    tensors = {s.name: torch.randn(s.shape) for s in SOURCES}
    plans = [plan_of(rank, world) for rank in range(world)]
    size = plans[0].layout()[1]
    arena = Arena(size * world)
    made = Destinations(plans, [arena.bytes[rank * size : (rank + 1) * size] for rank in range(world)])
    assert set(made.staged) == (set() if world == 1 else {s.name for s in SOURCES})
    for name, tensor in tensors.items():
        made.tensors[name].copy_(tensor)
    made.scatter()
    assert made.astray() == []
    if world == 2:
        made.copies.pairs[0][0].view(-1)[0] += 1
        assert made.astray() == [made.staged[0]]
        made.scatter()
    for rank, plan in enumerate(plans):
        loaded = Fused(rank, world)
        loaded.load_weights(tensors.items())
        offsets, _ = plan.layout()
        for storage in plan.storages:
            start = rank * size + offsets[storage.name]
            flat = arena.bytes[start : start + storage.bytes].view(torch.float32)
            assert torch.equal(flat, dict(loaded.named_parameters())[storage.name].detach().flatten())


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        ("computed", "norm is computed from the published weights, not copied"),
        ("added", "norm is changed by aten::add_ while loading"),
        ("forgotten", "norm goes nowhere"),
        ("twice", "norm is copied to more than one place"),
    ],
)
def test_what_cannot_be_copied_exactly_is_refused(spoil, says):
    with pytest.raises(PlanRefused, match=says):
        plan_of(spoil=spoil)


def test_a_source_that_no_rank_takes_whole_is_refused():
    """Two ranks that take the same half: each one's storages are full."""
    plans = [plan_of(0, 2), plan_of(0, 2)]
    assert source_problems([plan_of(0, 2), plan_of(1, 2)]) == []
    assert source_problems(plans) == [f"{n} elements of {s} go nowhere: no rank takes them" for s, n in
                                      (("q", 12), ("k", 12), ("v", 12), ("down", 12))]  # fmt: skip


def test_gaps_do_not_cancel_what_is_written_twice():
    def rows(offset, *shape, stride=None):
        return Region(offset, shape, stride or tuple(prod(shape[i + 1 :]) for i in range(len(shape))))

    assert cover([], 5) == (5, 0)
    assert cover([rows(0, 2, 6), rows(12, 2, 6)], 24) == (0, 0)
    assert cover([rows(0, 2, 6), rows(6, 2, 6)], 24) == (6, 6)
    assert cover([rows(0, 4, 3, stride=(6, 1)), rows(3, 4, 3, stride=(6, 1))], 24) == (0, 0)
    assert cover([rows(0, 4, 3, stride=(6, 1)), rows(2, 4, 3, stride=(6, 1))], 24) == (4, 4)
    assert cover([rows(0, 6, 4, stride=(1, 6))], 24) == (0, 0)  # transposed
    assert cover([rows(0), rows(0)], 1) == (0, 1)
    assert cover([rows(0, 9), rows(2, 3), rows(4, 3)], 10) == (1, 6)


@pytest.mark.parametrize("version", [1, 2])
def test_pages_of_files_count_as_free(tmp_path, monkeypatch, version):
    """A container that has read a large checkpoint has not used up its memory."""
    from advgame.publish import arena

    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    prefix = "" if version == 2 else "total_"
    folder = tmp_path if version == 2 else tmp_path / "memory"
    folder.mkdir(exist_ok=True)
    monkeypatch.setattr(arena, "CONTROL", tmp_path)
    whole = arena.free_bytes()
    for name, size in zip(names, (1000, 990), strict=True):
        (folder / name).write_text(f"{size}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{prefix}active_file 300\n{prefix}inactive_file 500\n")
    assert arena.free_bytes() == 810
    (folder / names[0]).write_text("max\n" if version == 2 else f"{2**62}\n")
    assert 0 < arena.free_bytes() <= 2 * whole


def test_missing_and_unknown_sources_are_refused():
    with pytest.raises(PlanRefused, match="6 elements of norm come from no source"):
        plan_of(sources=SOURCES[:-1])
    with pytest.raises(PlanRefused, match="load_weights refuses these weights: KeyError: 'extra'"):
        plan_of(sources=[*SOURCES, Source("extra", (2,))])
    with pytest.raises(PlanRefused, match="load_weights refuses these weights: RuntimeError"):
        plan_of(sources=[*SOURCES[:-1], Source("norm", (WIDE + 1,))], device="cpu")


def test_untied_heads_of_a_tied_model_are_refused():
    model = Fused()
    model.head = nn.Parameter(torch.zeros(8, WIDE))
    with pytest.raises(PlanRefused, match="48 elements of head come from no source"):
        record(model, SOURCES, name="m", dtype=torch.float32)


def test_prepacked_weights_are_refused():
    model = Fused()
    model.norm = nn.Parameter(torch.empty(0))
    with pytest.raises(PlanRefused, match="norm was emptied by weight prepacking"):
        record(model, SOURCES, name="m", dtype=torch.float32)


def test_models_that_are_refused_as_such():
    reasons = reasons_against(quantised="fp8", mla=True, experts=True)
    assert [next(word for word in ("quantised (fp8)", "MLA", "experts") if word in r) for r in reasons] == [
        "quantised (fp8)", "MLA", "experts"
    ]  # fmt: skip
    assert reasons_against(quantised=None, mla=False, experts=False) == []


@NEEDS_HOST
def test_an_arena_is_shared_and_bounded():
    arena = Arena(1000)
    other = mapped(arena.path, 1000)
    arena.bytes[17] = 5
    assert other[17] == 5
    with pytest.raises(ValueError, match=r"the shared file has \d+ bytes, the plan needs"):
        mapped(arena.path, 10**7)
    arena.close()
    other[18] = 6  # mappings outlive the file
    assert arena.bytes[18] == 6
    with pytest.raises(FileNotFoundError):
        mapped(arena.path, 1000)


@NEEDS_HOST
def test_too_little_memory_is_one_clear_line(monkeypatch):
    from advgame.errors import InputError
    from advgame.publish import arena

    monkeypatch.setattr(arena, "free_bytes", lambda: 2**30)
    with pytest.raises(InputError, match=r"rollout\.vllm\.transport: shm needs 4\.00 GiB .* 1\.00 GiB are free; free"):
        Arena(2**32)
    monkeypatch.setattr(arena, "free_bytes", lambda: 2**70)
    with pytest.raises(InputError, match=r"rollout\.vllm\.transport: shm gets no shared memory: .*; set loader"):
        Arena(2**62)
    monkeypatch.setattr(host, "_host", None)
    with pytest.raises(InputError, match=r"shm cannot be used, the C\+\+ extension of publishing is not there"):
        Arena(1)
