"""Checksums of many tensors: every implementation gives the reference's, which sees bytes and places."""

from __future__ import annotations

import advgame_kernels as ak
import pytest
import torch
from advgame_kernels import native, passes
from advgame_kernels.sums import FACTOR

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = [
    pytest.param("native", marks=pytest.mark.skipif(not native.available() or DEVICE != "cpu", reason="no extension")),
    pytest.param("triton", marks=pytest.mark.skipif(passes.triton_reason() is not None, reason="no Triton")),
]
SIZES = [0, 1, 3, 4, 15, 16, 17, 2047, 8191, 65_537, 262_145]


def filled(size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (size * dtype.itemsize,), generator=g, dtype=torch.uint8)
    return raw.view(dtype).to(DEVICE)


def weight(place: int) -> int:
    return 2 * (FACTOR * place % 2**32 >> 16) + 1


def by_hand(data: bytes) -> int:
    return sum(b * weight(i) for i, b in enumerate(data)) % 2**64


def test_the_reference_is_the_formula():
    x = filled(70_001, torch.uint8)
    (found,) = ak.byte_sums_ref([x]).tolist()
    assert found == by_hand(x.cpu().numpy().tobytes())


@pytest.mark.slow  # in the interpreter
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_every_implementation_gives_the_same(impl, dtype):
    tensors = [filled(size, dtype, i) for i, size in enumerate(SIZES)]
    assert torch.equal(ak.byte_sums(tensors, impl=impl), ak.byte_sums_ref(tensors))
    # the largest sums there are
    most = [torch.full((300_000,), 255, dtype=torch.uint8, device=DEVICE)]
    assert torch.equal(ak.byte_sums(most, impl=impl), ak.byte_sums_ref(most))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("offset", [1, 2, 3, 4])
def test_addresses_between_words(impl, offset):
    raw = filled(70_000, torch.uint8)
    tensors = [raw[offset : offset + n] for n in (1, 5, 66_000)]
    assert torch.equal(ak.byte_sums(tensors, impl=impl), ak.byte_sums_ref([t.clone() for t in tensors]))


@pytest.mark.parametrize("impl", IMPLS)
def test_prepared_sums_begin_from_zero_each_time(impl):
    tensors = [filled(1000, torch.float32), filled(33, torch.bfloat16, 1)]
    made = ak.PreparedSums(tensors, impl=impl)
    for value in (1.0, 2.0):
        tensors[0].fill_(value)
        made.launch()
        assert torch.equal(made.out, ak.byte_sums_ref(tensors))
    assert made.capturable == (DEVICE == "cuda")


@pytest.mark.skipif(not native.available() or DEVICE != "cpu", reason="no extension")
def test_every_instruction_set_and_thread_count_gives_the_same():
    used, threads = native.isa(), torch.get_num_threads()
    tensors = [filled(n, torch.uint8, n) for n in (10, 3_000_001, 77)]
    want = ak.byte_sums_ref(tensors)
    try:
        for isa in ("generic", "avx2", "avx512"):
            for count in (1, 3):
                torch.set_num_threads(count)
                try:
                    native._native.use_isa(isa)
                except ValueError:  # not this processor's
                    continue
                assert torch.equal(ak.byte_sums(tensors, impl="native"), want), (isa, count)
    finally:
        native._native.use_isa(used)
        torch.set_num_threads(threads)


def test_bytes_and_places_show():
    data = torch.arange(1000, device=DEVICE).to(torch.uint8)
    tensors = [data, data.roll(1), data.flip(0)]
    for place in range(0, 1000, 7):
        tensors.append(data.clone())
        tensors[-1][place] += 1
    assert len(set(ak.byte_sums(tensors).tolist())) == 3 + 143
    assert ak.byte_sums([data, data.clone()]).unique().numel() == 1


@pytest.mark.parametrize("size", [1 << n for n in range(4, 21)])
def test_halves_that_changed_places_show(size):
    """As rows, heads and pieces of a transport lie: powers of two apart."""
    data = filled(2 * size, torch.uint8)
    assert ak.byte_sums([data, data.roll(size)]).unique().numel() == 2


@pytest.mark.parametrize("impl", IMPLS)
def test_places_beyond_32_bits_of_sign(impl):
    """The weights wrap, in every implementation alike: from bytes 2^31 on a product's place has its sign bit set."""
    if DEVICE == "cpu" and impl == "triton":
        pytest.skip("minutes in the interpreter")
    size = (1 << 31) + 4099
    data = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    at = torch.tensor([0, 70_000, (1 << 31) - 1, 1 << 31, (1 << 31) + 4098], device=DEVICE)
    data[at] = torch.tensor([1, 2, 3, 4, 5], dtype=torch.uint8, device=DEVICE)
    want = sum(b * weight(i) for i, b in zip(at.tolist(), range(1, 6), strict=True))
    assert ak.byte_sums([data], impl=impl).tolist() == [want]


def test_what_cannot_be_summed_is_refused():
    gaps = torch.zeros(4, 6, device=DEVICE)[:, 1]
    with pytest.raises(ValueError, match=r"tensors\[1\].*a contiguous tensor"):
        ak.byte_sums([torch.zeros(3, device=DEVICE), gaps])
    assert ak.byte_sums([]).tolist() == []
    if DEVICE == "cuda":
        with pytest.raises(RuntimeError, match="serves tensors on the CPU only"):
            ak.byte_sums([torch.zeros(3, device=DEVICE)], impl="native")
