"""ema_update_ against a float64 average, with its published copy."""

from __future__ import annotations

import advgame_kernels as ak
import pytest
import torch
from advgame_kernels import native, passes

IMPLS = ["torch", pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="no extension"))]
NEEDS_TRITON = pytest.mark.skipif(passes.triton_reason() is not None, reason="no Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1,), (15,), (16, 3), (257,), (0,), (70_003,)]


def model(dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g).to(dtype) for s in SHAPES]


@pytest.mark.parametrize("impl", [*IMPLS, pytest.param("triton", marks=NEEDS_TRITON)])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("publish_dtype", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("decay", [0.95, torch.tensor(0.95), 0.0, 1.0])
def test_matches_float64(impl, param_dtype, publish_dtype, decay):
    shadow, params = model(torch.float32, 1), model(param_dtype, 2)
    publish = None if publish_dtype is None else [torch.full(s, 7.0).to(publish_dtype) for s in SHAPES]
    d = float(decay)
    want = [d * s.double() + (1 - d) * p.double() for s, p in zip(shadow, params, strict=True)]
    ak.ema_update_(shadow, params, decay, publish=publish, impl=impl)
    interpreted = (
        impl == "triton" and DEVICE == "cpu"
    )  # Triton's interpreter truncates to bf16; the compiled kernel rounds
    for i, s in enumerate(shadow):
        torch.testing.assert_close(s.double(), want[i], rtol=2e-7, atol=2e-7)
        if publish is not None:
            torch.testing.assert_close(publish[i], s.to(publish_dtype), rtol=2**-7 if interpreted else 0, atol=0)


@pytest.mark.parametrize("publish_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.float16])
def test_a_prepared_update_is_the_update(param_dtype, publish_dtype):
    """To the last bit, step after step, with decays that change."""
    params = [p.to(DEVICE) for p in model(param_dtype, 2)]
    both = []
    for _ in range(2):
        shadow = [s.to(DEVICE) for s in model(torch.float32, 1)]
        publish = None
        if publish_dtype is not None:
            publish = [torch.zeros(s, device=DEVICE, dtype=publish_dtype) for s in SHAPES]
            publish[3] = None
        both.append((shadow, publish))
    prepared = ak.PreparedEma(both[0][0], params, both[0][1])
    for decay in (0.0, 0.95, 2 / 11):
        prepared(decay)
        ak.ema_update_(both[1][0], params, decay, publish=both[1][1])
        params[5] += 0.25
    assert all(torch.equal(a, b) for a, b in zip(both[0][0], both[1][0], strict=True))
    if publish_dtype is not None:
        assert all(b is None or torch.equal(a, b) for a, b in zip(both[0][1], both[1][1], strict=True))
    with pytest.raises(ValueError, match=r"publish\[0\]"):
        ak.PreparedEma(both[0][0], params, [torch.zeros(2)] * len(params))


@NEEDS_TRITON
def test_a_prepared_triton_launch_reads_its_step_when_it_runs():
    """The launch that a CUDA graph captures, here in the interpreter."""
    from advgame_kernels import ema_triton

    shadow, params = [torch.zeros(40, device=DEVICE)], [torch.ones(40, device=DEVICE)]
    launch = ema_triton.prepare(shadow, params, [])
    step = torch.ones(1, device=DEVICE)
    for value, want in ((0.5, 0.5), (0.0, 0.5), (1.0, 1.0)):
        launch.run(step.fill_(value))
        assert torch.equal(shadow[0], torch.full((40,), want, device=DEVICE))


NEEDS_NATIVE = pytest.mark.skipif(not native.available(), reason="no extension")


def isas() -> list[str]:
    """The instruction sets of the extension that this processor has."""
    if not native.available():
        return ["generic"]
    used, found = native.isa(), []
    for isa in ("generic", "avx2", "avx512"):
        try:
            native._native.use_isa(isa)
            found.append(isa)
        except ValueError:
            continue
    native._native.use_isa(used)
    return found


@pytest.fixture
def isa(request):
    used = native.isa()
    native._native.use_isa(request.param)
    yield request.param
    native._native.use_isa(used)


@NEEDS_NATIVE
@pytest.mark.parametrize("isa", isas(), indirect=True)
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compensated", [False, True])
def test_native_equals_the_reference_to_the_last_bit(isa, param_dtype, compensated):
    """Over steps of different size, with a copy, also of tensors large enough for the loop past the caches."""
    params = [*model(param_dtype, 2), torch.randn(1 << 20, generator=torch.Generator().manual_seed(4)).to(param_dtype)]
    kind = torch.bfloat16 if compensated else torch.float32
    shadows = [
        [torch.randn(p.shape, generator=torch.Generator().manual_seed(5)).to(kind) for p in params] for _ in "ab"
    ]
    copies, kept = ([[torch.zeros(p.shape, dtype=torch.bfloat16) for p in params] for _ in "ab"] for _ in "ck")
    for decay in (0.95, 0.9999, 0.3):
        extra = [{"compensation": k} if compensated else {} for k in kept]
        ak.ema_update_(shadows[0], params, decay, publish=copies[0], impl="native", **extra[0])
        ak.ema_update_ref_(shadows[1], params, decay, publish=copies[1], **extra[1])
        for one, other in (shadows, copies, kept):
            assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@NEEDS_TRITON
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16])
def test_triton_equals_the_reference_to_the_last_bit(param_dtype):
    """In the interpreter, and on a GPU since the compiler may not fuse the product with the addition."""
    params = [p.to(DEVICE) for p in model(param_dtype, 2)]
    one, other = ([s.to(DEVICE) for s in model(torch.float32, 1)] for _ in "ab")
    for decay in (0.95, 0.9999, 0.3):
        ak.ema_update_(one, params, decay, impl="triton")
        ak.ema_update_ref_(other, params, decay)
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@NEEDS_NATIVE
def test_native_random_bits_depend_on_seed_and_place_alone():
    """Not on threads, instruction sets, addresses, or on how a model is cut into tensors."""
    n = 3 * (1 << 16) + 7
    g = torch.Generator().manual_seed(0)
    start, player = torch.randn(n, generator=g).bfloat16(), torch.randn(n, generator=g)

    def rounded(seed, cuts=(n,), offset=0):
        room = torch.zeros(n + offset, dtype=torch.bfloat16)
        room[offset:].copy_(start)
        ak.ema_update_(room[offset:].split(list(cuts)), player.split(list(cuts)), 0.5, seed=seed, impl="native")
        return room[offset:].clone()

    want, threads, used = rounded(7), torch.get_num_threads(), native.isa()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for isa in isas():
                native._native.use_isa(isa)
                assert torch.equal(rounded(7), want)
        assert torch.equal(rounded(7, cuts=(5, n - 5), offset=3), want)
    finally:
        torch.set_num_threads(threads)
        native._native.use_isa(used)
    different = [(rounded(seed) != want).double().mean() for seed in (8, 9, 7 + (1 << 32), 7 + (1 << 63))]
    # two neighbours half the time at most: a third of all in the mean
    assert all(0.25 < share < 0.4 for share in different)


@pytest.mark.skipif(not native.available(), reason="no extension")
@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16])
def test_large_tensors_with_a_copy_at_any_address(offset, param_dtype):
    # Large copies bypass the caches, which asks for aligned addresses: the ends are written one by one.
    n = (1 << 20) + 21
    g = torch.Generator().manual_seed(0)
    shadow, param = torch.randn(n, generator=g), torch.randn(n, generator=g).to(param_dtype)
    room = torch.full((n + 8,), 7.0, dtype=torch.bfloat16)
    want = shadow + (param.float() - shadow) * 0.25
    ak.ema_update_([shadow], [param], 0.75, publish=[room[offset : offset + n]], impl="native")
    torch.testing.assert_close(shadow, want, rtol=2e-7, atol=2e-7)
    assert torch.equal(room[offset : offset + n], shadow.bfloat16())
    assert (room[:offset] == 7).all()
    assert (room[offset + n :] == 7).all()


@NEEDS_TRITON
def test_one_triton_launch_finds_every_segment_of_every_tensor(monkeypatch):
    from advgame_kernels import ema_triton

    monkeypatch.setattr(ema_triton, "BLOCK", 16)
    monkeypatch.setattr(ema_triton, "BLOCKS", 2)
    sizes = [1, 31, 32, 33, 0, 64, 100, 7, 3, 65, 0, 129]
    g = torch.Generator().manual_seed(0)
    shadow = [torch.randn(n, generator=g).to(DEVICE) for n in sizes]
    params = [torch.randn(n, generator=g).to(DEVICE, torch.float16 if n % 2 else torch.float32) for n in sizes]
    publish = [None if n == 7 else torch.zeros(n, dtype=torch.float16, device=DEVICE) for n in sizes]
    want = [0.9 * s.double() + 0.1 * p.double() for s, p in zip(shadow, params, strict=True)]
    ak.ema_update_(shadow, params, torch.tensor(0.9, device=DEVICE), publish=publish, impl="triton")
    for s, w, out in zip(shadow, want, publish, strict=True):
        torch.testing.assert_close(s.double(), w, rtol=2e-7, atol=2e-7)
        assert out is None or torch.equal(out, s.half())


@pytest.mark.parametrize("impl", IMPLS)
def test_published_bf16_rounds_to_even_and_keeps_special_values(impl):
    special = torch.tensor(
        [1.0, 1.00390625, 1.01171875, 3.3895e38, float("inf"), float("-inf"), float("nan"), -0.0, 1e-40]
    )
    shadow, out = [special.clone()], [torch.zeros(9, dtype=torch.bfloat16)]
    ak.ema_update_(shadow, [torch.zeros(9)], 1.0, publish=out, impl=impl)
    kept = torch.isfinite(special)
    assert torch.equal(out[0][kept], special.to(torch.bfloat16)[kept])
    assert torch.isnan(out[0][6])


def test_follows_a_tiny_learning_rate():
    shadow, params = [torch.ones(10)], [torch.ones(10)]
    for _ in range(100):
        params[0] += 1e-6
        ak.ema_update_(shadow, params, 0.95)
    lag = (params[0] - shadow[0]).double()
    assert (lag > 1.4e-5).all()  # decay/(1-decay) = 19 steps of 1e-6
    assert (lag < 2.4e-5).all()


def test_entries_without_publication_and_other_dtypes():
    shadow, params = [torch.zeros(3), torch.zeros(4)], [torch.ones(3), torch.ones(4, dtype=torch.float16)]
    out = [None, torch.zeros(4, dtype=torch.float16)]
    ak.ema_update_(shadow, params, 0.5, publish=out)
    assert torch.equal(shadow[0], torch.full((3,), 0.5))
    assert torch.equal(out[1], torch.full((4,), 0.5, dtype=torch.float16))


def test_parameters_that_require_gradients_are_taken_as_they_are():
    p = torch.nn.Parameter(torch.ones(3))
    shadow = [torch.zeros(3)]
    ak.ema_update_(shadow, [p], 0.5)
    assert not shadow[0].requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shadow": [torch.zeros(3, dtype=torch.bfloat16)]}, r"shadow\[0\]"),
        ({"params": [torch.zeros(4)]}, r"params\[0\]"),
        ({"params": []}, "params"),
        ({"params": [torch.zeros(3, dtype=torch.int32)]}, r"params\[0\]"),
        ({"decay": 1.5}, "decay"),
        ({"decay": float("nan")}, "decay"),
        ({"publish": [torch.zeros(2)]}, r"publish\[0\]"),
        ({"publish": []}, "publish"),
        ({"shadow": [torch.zeros(3, 3).t()[0]]}, r"shadow\[0\]"),
    ],
)
def test_refusals_name_the_argument(change, message):
    call = {"shadow": [torch.zeros(3)], "params": [torch.zeros(3)], "decay": 0.9} | change
    with pytest.raises(ValueError, match=message):
        ak.ema_update_(call.pop("shadow"), call.pop("params"), call.pop("decay"), **call)


NARROW_IMPLS = [*IMPLS, pytest.param("triton", marks=NEEDS_TRITON)]


@pytest.mark.parametrize("impl", NARROW_IMPLS)
def test_stochastic_rounding_is_unbiased_and_keeps_both_neighbours(impl):
    n = 20_000
    shadow = [torch.ones(n, dtype=torch.bfloat16, device=DEVICE)]
    target = 1.0 + 0.3 * 2**-7  # three tenths of an ulp above
    ak.ema_update_(shadow, [torch.full((n,), target, device=DEVICE)], 0.0, seed=3, impl=impl)
    values = shadow[0].double()
    assert set(values.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert abs(values.mean().item() - target) < 5 * 2**-7 * (0.21 / n) ** 0.5
    again = [torch.ones(n, dtype=torch.bfloat16, device=DEVICE)]
    ak.ema_update_(again, [torch.full((n,), target, device=DEVICE)], 0.0, seed=3, impl=impl)
    assert torch.equal(again[0], shadow[0])
    ak.ema_update_(again, [torch.full((n,), target, device=DEVICE)], 0.0, seed=4, impl=impl)
    assert not torch.equal(again[0], shadow[0])


@pytest.mark.parametrize("impl", NARROW_IMPLS)
@pytest.mark.parametrize("how", ["stochastic", "compensation"])
def test_a_bfloat16_shadow_follows_small_steps(impl, how, monkeypatch):
    n = 256
    if impl == "triton":
        from advgame_kernels import ema_triton

        monkeypatch.setattr(ema_triton, "BLOCK", 128)
        monkeypatch.setattr(ema_triton, "BLOCKS", 1)
    param, exact = torch.ones(n, device=DEVICE), torch.ones(n, dtype=torch.float64, device=DEVICE)
    shadow = [torch.ones(n, dtype=torch.bfloat16, device=DEVICE)]
    publish = [torch.zeros(n, dtype=torch.float32, device=DEVICE)]
    kept = [torch.zeros(n, dtype=torch.bfloat16, device=DEVICE)]
    for step in range(24):
        param += 4e-3
        exact += 0.05 * (param.double() - exact)
        extra = {"seed": step} if how == "stochastic" else {"compensation": kept}
        ak.ema_update_(shadow, [param], 0.95, publish=publish, impl=impl, **extra)
    assert torch.equal(publish[0], shadow[0].float())
    if how == "compensation":
        torch.testing.assert_close(shadow[0].double() + kept[0].double(), exact, rtol=2e-4, atol=0)
    else:
        assert abs(shadow[0].double().mean() - exact.mean()) < 3e-3
    assert exact[0] > 1.03  # while rounding to nearest would never have left 1


def test_special_values_survive_stochastic_rounding():
    from advgame_kernels.ema_bf16 import round_stochastically

    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1.0, -2.5])
    out = round_stochastically(x, torch.Generator().manual_seed(0))
    assert torch.equal(out[[0, 1, 3, 4, 5, 6]].float(), x[[0, 1, 3, 4, 5, 6]])
    assert torch.isnan(out[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, r"shadow\[0\]: expected a float32"),
        ({"seed": 1, "shadow": [torch.zeros(3)]}, r"shadow\[0\]: expected a bfloat16"),
        ({"seed": 1, "compensation": [torch.zeros(3, dtype=torch.bfloat16)]}, "seed"),
        ({"compensation": [torch.zeros(3)]}, r"compensation\[0\]"),
        ({"compensation": []}, "compensation"),
    ],
)
def test_bfloat16_refusals(change, message):
    call = {"shadow": [torch.zeros(3, dtype=torch.bfloat16)]} | change
    with pytest.raises(ValueError, match=message):
        ak.ema_update_(call.pop("shadow"), [torch.zeros(3)], 0.9, **call)
