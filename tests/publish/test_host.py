"""The host side of publishing on the CPU: shared memory that nobody can leak or cut short, copies as one call."""

import asyncio
import gc
import os
import subprocess
import sys

import pytest
import torch

from advgame.errors import InputError
from advgame.publish import host
from advgame.publish.arena import path_of
from advgame.publish.channels import AutoChannel, IpcChannel, ShmChannel
from advgame.publish.copies import Copies
from advgame.publish.loader import LoaderChannel, file_tensor
from advgame.publish.plan import sources_of

NEEDS = pytest.mark.skipif(host.missing() is not None, reason="no extension")


def maps():
    with open("/proc/self/maps") as lines:
        return sum("advgame-weights" in line for line in lines)


def memory(*arguments):
    return host.require("shm").SharedMemory(*arguments)


@NEEDS
def test_a_mapping_lives_as_long_as_the_last_tensor_over_it():
    before = maps()
    made = memory(10_000)
    part = torch.frombuffer(made, dtype=torch.uint8)[100:200]
    assert not part.any()
    assert maps() == before + 1
    del made
    gc.collect()
    part.fill_(3)
    assert maps() == before + 1
    del part
    gc.collect()
    assert maps() == before


@NEEDS
def test_neither_side_can_cut_it_short():
    made = memory(10_000)
    for size in (0, 100_000):
        with pytest.raises(PermissionError):
            os.truncate(f"/proc/self/fd/{made.descriptor}", size)


@NEEDS
def test_what_cannot_be_mapped_says_why():
    made = memory(10_000)
    path = f"/proc/self/fd/{made.descriptor}"
    with pytest.raises(ValueError, match="the shared file has 12288 bytes, the plan needs 20000"):
        memory(path, 20_000)
    made.close_file()
    with pytest.raises(FileNotFoundError):
        memory(path, 10_000)
    with pytest.raises(OSError, match="mapping 4611686018427387904 bytes: Cannot allocate memory"):
        memory(2**62)
    assert made.descriptor == -1
    made.close_file()


@NEEDS
def test_another_process_writes_into_the_same_memory():
    made = memory(10_000)
    code = "import sys; from advgame.publish.arena import mapped; mapped(sys.argv[1], 10_000)[17] = 5"
    subprocess.run([sys.executable, "-c", code, f"/proc/{os.getpid()}/fd/{made.descriptor}"], check=True)
    assert torch.frombuffer(made, dtype=torch.uint8).nonzero().tolist() == [[17]]


def boxes():
    """Pairs of views (into, taken) by what they are, and how many rows of bytes each becomes; None: torch's."""
    g = torch.Generator().manual_seed(0)

    def of(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype), torch.randn(shape, generator=g).to(dtype)

    whole = of(6, 8)
    wide = of(6, 8, dtype=torch.bfloat16)
    cube = of(4, 6, 8)
    yield "whole", whole, 1
    yield "rows", tuple(t[1:4] for t in of(6, 8)), 1
    yield "columns", tuple(t[:, 2:5] for t in wide), 1
    yield "columns into a whole", (torch.zeros(6, 3), of(6, 8)[1][:, 2:5]), 1
    yield "a box", tuple(t[1:3, 2:5, 1:4] for t in cube), 2
    yield "both turned around", tuple(t.t() for t in of(6, 8)), 1
    yield "a number", tuple(t[2, 3] for t in of(6, 8)), 1
    yield "one taken often", (torch.zeros(5, 8), of(8)[1].expand(5, 8)), 5
    yield "empty", tuple(t[:0] for t in of(6, 8)), 0
    yield "one turned around", (torch.zeros(8, 6), of(6, 8)[1].t()), None
    yield "every other", tuple(t[:, ::2] for t in of(6, 8)), None
    yield "converts", (torch.zeros(6, 8, dtype=torch.bfloat16), of(6, 8)[1]), None
    yield "too many pieces", tuple(t[:, :, :1] for t in of(2000, 6, 8)), None


@NEEDS
@pytest.mark.parametrize(("pair", "rows"), [pytest.param(*rest, id=name) for name, *rest in boxes()])
def test_a_copy_is_rows_of_bytes_or_torchs(pair, rows):
    into, taken = pair
    around = into.clone()
    made = Copies([pair])
    assert len(made) == 1
    assert (len(made.rows), bool(made.rest)) == ((rows, False) if rows is not None else (0, True))
    made()
    assert torch.equal(into, taken.to(into.dtype))
    assert around.shape == into.shape


@NEEDS
@pytest.mark.parametrize("threads", [1, 3])
def test_all_copies_are_one_call_and_touch_nothing_else(threads):
    """Large enough for several threads, with borders of theirs inside rows."""
    g = torch.Generator().manual_seed(1)
    sources = [torch.randn(n, 1111, generator=g) for n in (3, 700, 1, 400)]
    targets = [torch.full((len(s), 2000), 7.0) for s in sources]
    pairs = [(t[:, 5 : 5 + 1001], s[:, 10 : 10 + 1001]) for s, t in zip(sources, targets, strict=True)]
    made = Copies(pairs)
    assert made.rows.bytes == sum(4 * 1001 * len(s) for s in sources) > 4 << 20
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        made()
    finally:
        torch.set_num_threads(before)
    for into, taken in pairs:
        assert torch.equal(into, taken)
    for target in targets:
        assert target[:, :5].eq(7).all()
        assert target[:, 1006:].eq(7).all()


@NEEDS
def test_no_copies_are_none_and_shapes_must_agree():
    Copies([])()
    with pytest.raises(ValueError, match=r"a copy of \(3,\) into \(2,\)"):
        Copies([(torch.zeros(2), torch.zeros(3))])
    with pytest.raises(ValueError, match="shape and strides have different lengths"):
        host.require("shm").Copies([(1, 1, 4, [2, 3], [3, 1], [1])])


def test_without_the_extension_torch_copies(monkeypatch):
    monkeypatch.setattr(host, "_host", None)
    into, taken = torch.zeros(6, 8), torch.randn(6, 8)
    made = Copies([(into[:, 1:3], taken[:, 1:3])])
    made()
    assert len(made.rest) == 1
    assert torch.equal(into[:, 1:3], taken[:, 1:3])


def test_without_the_extension_auto_goes_through_the_loader_and_says_so(monkeypatch):
    monkeypatch.setattr(host, "_host", None)
    channel = AutoChannel("m", sources_of([("w", torch.zeros(3, 5))]), "bfloat16")
    assert channel.notes[0].startswith(
        "weights go through vLLM's loader, which is slower: the C++ extension of publish"
    )
    assert isinstance(channel.used, LoaderChannel)
    assert channel.prepare() == {}
    asyncio.run(channel.attach(None))
    channel.destinations["w"].fill_(2)
    path, size = path_of(channel.used._file), channel.used._size
    seen = file_tensor(path, size).view(torch.bfloat16)
    assert seen[:15].eq(2).all()
    seen[0] = 3
    assert channel.destinations["w"][0, 0] == 3
    channel.close()
    for transport in (ShmChannel("m", ()), IpcChannel("m", (), torch.device("cuda", 0))):
        with pytest.raises(
            InputError, match=r"(shm|ipc) cannot be used, the C\+\+ extension of publishing is not there"
        ):
            transport.prepare()
    host.cuda.cache_clear()
